"""The identity of a result: everything that determines its numbers, and how a saved identity is compared with a new call's.

A result on disk (a cache, a run, a report, a store, the rows of a bench) records the request it was made for, and serves a
call only if the two match. A key that it lacks was added after the version that wrote it: `absent` says what that version
did, or, if that cannot be known, the key is assumed to match (`ANY`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saelab.models.language_model import LanguageModel
from saelab.saes.base import SAE
from saelab.saes.config import settings
from saelab.tokens import Texts
from saelab.tokens.mask import MASK_RULE
from saelab.tokens.packing import PACKED
from saelab.tokens.tokenizing import resolved_bos, tokenizer_probe

ANY = object()
"""Value of an absent key that cannot be known."""
_NONE = "(none)"
_TOKENIZER = ("bos_id", "eos_id", "tokenizer_files", "tokenizer_probe")
_FUNCTION = ("model_config", "logits_probe")
LATER: dict[str, Any] = dict.fromkeys((*_TOKENIZER, *_FUNCTION), ANY)
"""Keys of `of_model` that were added after the first version, for `absent`."""


def of_model(lm: LanguageModel) -> dict[str, Any]:
    """What determines a model's outputs for a text: its weights, their dtype, its config, anything hooked into it, and its
    tokenizer with the roles of special tokens."""
    dtype = str(lm.dtype).removeprefix("torch.")
    known = {"model_hash": lm.hash, "model_dtype": dtype, "tokenizer_hash": lm.tokenizer_hash}
    files = {"tokenizer_files": lm.tokenizer_files} if lm.tokenizer_files else {}
    known |= {"special_ids": sorted(lm.special_ids), "bos_id": lm.bos_id, "eos_id": lm.eos_id} | files
    known |= {"tokenizer_probe": tokenizer_probe(lm.tokenizer)} if lm.tokenizer is not None else {}
    return known | {"model_config": lm.config_hash, "logits_probe": lm.logits_probe}


def of_rows(lm: LanguageModel, texts: Texts, hooks: Sequence[str]) -> dict[str, Any]:
    """What determines the rows of a cache or a stream besides the caller's numeric arguments."""
    known = of_model(lm) | {"hooks": {hook: lm.d_in(hook) for hook in hooks}}
    return known | {"texts_fingerprint": texts.fingerprint(), "packing": PACKED, "mask_rule": MASK_RULE}


def of_scoring(sae: SAE, lm: LanguageModel, texts: Texts) -> dict[str, Any]:
    """What determines the numbers of a report or a store besides the caller's arguments; serialisable as JSON."""
    origin = {key: sae.provenance.origin.get(key) for key in ("hook_name", "ctx_len", "prepend_bos", "mask")}
    if origin["prepend_bos"] is None:  # the first version read no BOS then, and did not record it
        origin["prepend_bos"] = resolved_bos(lm, None) or None
    origin |= {
        key: sae.provenance.origin[key]
        for key in ("hook_names", "hook_name_out", "hook_names_out", "packing")
        if key in sae.provenance.origin
    }
    read_by = of_model(lm)
    model_hash, _ = read_by.pop("model_hash"), read_by.pop("model_dtype")
    return {
        "sae": {"hash": sae.hash, "variant": sae.variant, "config": settings(sae.config), **origin},
        "model": {"hash": model_hash, "dtype": str(lm.dtype), **read_by},
        "texts": {"fingerprint": texts.fingerprint(), "own": texts.spec == sae.provenance.origin.get("texts")},
        "mask_rule": MASK_RULE,
    }


def scoring_absent(tokenizer_hash: str | None) -> dict[str, Any]:
    """Keys of `of_scoring` that the first version lacks; it read texts with the tokenizer `tokenizer_hash`, if known."""
    later = LATER | {"tokenizer_hash": tokenizer_hash or ANY, "special_ids": ANY}
    absent = {f"model.{key}": value for key, value in later.items()}
    return absent | {"mask_rule": ANY, "sae.variant": ANY, "sae.config": ANY}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], absent: Mapping[str, Any] | None = None) -> list[str]:
    """One "key: old -> new" per value that differs, with dotted keys ("a.b") for nested dicts; hashes are shortened.

    `absent`: the value that a key missing in `old` had in the version that wrote it; `ANY` may also replace a whole dict.
    """
    before, now = _flat(old), _flat(new)
    pairs = {key: (_then(key, before, now, absent or {}), now.get(key, _NONE)) for key in {**before, **now}}
    halves = any("16" in str(value) for key, value in now.items() if key.endswith(("model_dtype", "model.dtype")))
    tolerance = 0.05 if halves else 1e-3
    return [
        f"{key}: {_short(then)} -> {_short(asked)}"
        for key, (then, asked) in pairs.items()
        if then != asked and not (key.endswith("logits_probe") and _close(then, asked, tolerance))
    ]


def refusal(folder: Path, kind: str, different: Sequence[str], elsewhere: str) -> str:
    """The message for a folder begun by a different call: what differs, and the two ways to proceed."""
    return (
        f"{folder} already holds a {kind} made with different arguments ({'; '.join(different)}). Use the same arguments to "
        f"resume it, or {elsewhere}."
    )


def _close(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two logit probes of a model differ by no more than they do between machines."""
    if not isinstance(one, list) or not isinstance(other, list) or len(one) != len(other):
        return False
    return all(abs(x - y) <= tolerance for x, y in zip(one, other, strict=True))


def _then(key: str, before: Mapping[str, Any], now: Mapping[str, Any], absent: Mapping[str, Any]) -> Any:
    if key in before:
        return before[key]
    if key in absent:
        return now[key] if absent[key] is ANY else absent[key]
    lacks = (group for group in _groups(key) if not any(name.startswith(f"{group}.") for name in before))
    return now[key] if key in now and any(absent.get(group) is ANY for group in lacks) else _NONE


def _groups(key: str) -> list[str]:
    """The dicts that contain a dotted key, outermost first."""
    words = key.split(".")
    return [".".join(words[:n]) for n in range(1, len(words))]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted key."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _short(value: Any) -> str:
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", str(value))
    return text if len(text) <= 80 else f"{text[:80]}..."
