"""What makes two results the same: the one list of what decides a number, and how a saved one is held against it.

A result on disk (a cache, a run, a report, a store, the rows of a bench) keeps what it was asked for, and answers a call
only where that agrees. A key that it lacks came later than the version that wrote it: it means what that version did,
which `absent` says, or, where nobody can tell any more, it is taken to agree (`ANY`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from saelab.models.language_model import LanguageModel
from saelab.saes.base import SAE
from saelab.tokens import Texts
from saelab.tokens.mask import MASK_RULE
from saelab.tokens.packing import PACKED
from saelab.tokens.tokenizing import resolved_bos

ANY = object()
"""Of an absent key: nobody can tell what it was."""
_NONE = "(none)"
LATER: dict[str, Any] = dict.fromkeys(("bos_id", "eos_id", "tokenizer_files"), ANY)
"""Of `of_model`: keys that came after the first version, as `absent`."""


def of_model(lm: LanguageModel) -> dict[str, Any]:
    """What a model makes of a text: its weights, their dtype, and its tokenizer with the roles of special tokens."""
    dtype = str(lm.dtype).removeprefix("torch.")
    known = {"model_hash": lm.hash, "model_dtype": dtype, "tokenizer_hash": lm.tokenizer_hash}
    files = {"tokenizer_files": lm.tokenizer_files} if lm.tokenizer_files else {}
    return known | {"special_ids": sorted(lm.special_ids), "bos_id": lm.bos_id, "eos_id": lm.eos_id} | files


def of_rows(lm: LanguageModel, texts: Texts, hooks: Sequence[str]) -> dict[str, Any]:
    """What decides the rows of a cache or a stream beside the numbers that the caller gives."""
    known = of_model(lm) | {"hooks": {hook: lm.d_in(hook) for hook in hooks}}
    return known | {"texts_fingerprint": texts.fingerprint(), "packing": PACKED, "mask_rule": MASK_RULE}


def of_scoring(sae: SAE, lm: LanguageModel, texts: Texts) -> dict[str, Any]:
    """What decides the numbers of a report or a store beside the caller's arguments, JSON-able."""
    origin = {key: sae.origin.get(key) for key in ("hook_name", "ctx_len", "prepend_bos", "mask")}
    if origin["prepend_bos"] is None:  # the first version read no BOS then, and noted nothing
        origin["prepend_bos"] = resolved_bos(lm, None) or None
    origin |= {key: sae.origin[key] for key in ("hook_names", "hook_name_out", "packing") if key in sae.origin}
    read_by = {key: value for key, value in of_model(lm).items() if not key.startswith("model_")}
    return {
        "sae": {"hash": sae.hash, **origin},
        "model": {"hash": lm.hash, "dtype": str(lm.dtype), **read_by},
        "texts": {"fingerprint": texts.fingerprint(), "own": texts.spec == sae.origin.get("texts")},
        "mask_rule": MASK_RULE,
    }


def scoring_absent(tokenizer_hash: str | None) -> dict[str, Any]:
    """Keys of `of_scoring` that the first version lacks; it read texts with the tokenizer of `tokenizer_hash`, if known."""
    later = LATER | {"tokenizer_hash": tokenizer_hash or ANY, "special_ids": ANY}
    return {f"model.{key}": value for key, value in later.items()} | {"mask_rule": ANY}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], absent: Mapping[str, Any] | None = None) -> list[str]:
    """One "key: old -> new" for each value that differs, "a.b" for those inside dicts; hashes are cut short.

    `absent`: what a key that `old` lacks meant to the version that wrote it; `ANY` also of a dict that lacks as a whole.
    """
    before, now = _flat(old), _flat(new)
    pairs = {key: (_then(key, before, now, absent or {}), now.get(key, _NONE)) for key in {**before, **now}}
    return [f"{key}: {_short(then)} -> {_short(asked)}" for key, (then, asked) in pairs.items() if then != asked]


def _then(key: str, before: Mapping[str, Any], now: Mapping[str, Any], absent: Mapping[str, Any]) -> Any:
    if key in before:
        return before[key]
    if key in absent:
        return now[key] if absent[key] is ANY else absent[key]
    group = key.partition(".")[0]
    known = absent.get(group) is not ANY or any(name.startswith(f"{group}.") for name in before)
    return _NONE if known else now[key]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _short(value: Any) -> str:
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", str(value))
    return text if len(text) <= 80 else f"{text[:80]}..."
