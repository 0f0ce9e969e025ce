"""Numbers and switches in configs and in `assume=`, taken as they are meant or refused by name: never rounded or read as true."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from saelab.errors import SaelabError

ASSUMED_VARIANTS = (
    "topk", "abs_topk", "relu", "jumprelu", "transcoder", "skip_transcoder", "relu_transcoder", "jumprelu_transcoder",
)  # fmt: skip
"""Kinds that the same weights can be of."""


def integer(value: Any, key: str, where: str) -> int:
    """A whole number of 1 or more. Raises `SaelabError` for anything else."""
    if not _is_count(value):
        raise SaelabError(f"{where} says {key}={value!r}, but a whole number of 1 or more was expected.")
    return int(value)


def boolean(value: Any, key: str, where: str, default: bool = False) -> bool:
    """True, False, or `default` for None. Raises `SaelabError` for anything else."""
    if value is None:
        return default
    if not isinstance(value, bool):
        raise SaelabError(f"{where} says {key}={value!r}, but true or false was expected.")
    return value


def check_sizes(cfg: Mapping[str, Any], actual: Mapping[str, int], where: str) -> None:
    """Raise `SaelabError` if a config names another size than the tensors have."""
    for key, size in actual.items():
        if cfg.get(key) is not None and cfg[key] != size:
            raise SaelabError(
                f"{where}: the config says {key}={cfg[key]!r}, but the tensors have {size}: they do not belong together."
            )


def check_unused(tensors: Mapping[str, Any], used: Sequence[str], where: str) -> None:
    """Raise `SaelabError` for a tensor that changes what an SAE computes and that this kind of SAE would leave out."""
    telling = ("threshold", "log_threshold", "W_skip", "r_mag", "b_mag", "b_gate", "affine_skip_connection")
    if left_out := [name for name in telling if name in tensors and name not in used]:
        raise SaelabError(
            f"{where} also holds {' and '.join(left_out)}, for which such an SAE has no use: its config names "
            "another kind of SAE than its weights are of."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1 and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_scale(value: Any) -> bool:
    return (
        bool((value > 0).all()) and bool(value.isfinite().all())
        if isinstance(value, Tensor)
        else _is_number(value) and value > 0
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0 and all(map(_is_text, value))


def _is_bos(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list) and all(isinstance(one, int) for one in value))


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in names), f"one of {', '.join(names)}"


_SWITCH = (lambda value: isinstance(value, bool)), "True or False"
_SCALE = _is_scale, "a number above 0"
_NUMBER = (
    (lambda value: bool(value.isfinite().all()) if isinstance(value, Tensor) else _is_number(value)),
    "a finite number",
)
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "variant": _one_of(*ASSUMED_VARIANTS), "k": (_is_count, "a whole number of 1 or more"), "threshold": _NUMBER,
    "pre_bias": _SWITCH, "normalize": _one_of("none", "layer_norm", "constant_norm"), "scale": _SCALE, "scale_out": _SCALE,
    "select": _one_of("topk", "groupmax"), "score": _one_of("value", "decoder_norm"), "stop_on_duplicate": _SWITCH,
    "signed": _SWITCH, "residual_threshold": _NUMBER, "hook_name": (_is_text, "the name of a hook"),
    "hook_name_out": (_is_text, "the name of a hook"), "hook_names": (_are_texts, "a list of names of hooks"),
    "model": (_is_text, "the name of a model"), "prepend_bos": (_is_bos, "True, False or a list of token ids"),
    "ctx_len": (_is_count, "a whole number of 1 or more"),
}  # fmt: skip
_OF_VARIANTS = {
    "k": ("topk", "abs_topk", "transcoder", "skip_transcoder", "matching_pursuit", "batch_topk", "matryoshka"),
    "threshold": ("jumprelu", "jumprelu_transcoder", "batch_topk", "matryoshka", "crosscoder"),
    "scale_out": ("transcoder", "skip_transcoder", "relu_transcoder", "jumprelu_transcoder"),
}


def check_given(given: Any) -> None:
    """Raise `ValueError` for an `assume` that is no mapping of known keys to values of their kinds."""
    if not isinstance(given, Mapping):
        raise ValueError(f"assume={given!r} must be a dict, such as assume={{'k': 64}}.")
    unknown = [key for key in given if key not in _CHECKS]
    if unknown:
        raise ValueError(f"assume has {', '.join(map(repr, unknown))}; it takes {', '.join(_CHECKS)}.")
    for key, value in given.items():
        holds, wanted = _CHECKS[key]
        if not holds(value):
            raise ValueError(f"assume={{{key!r}: {value!r}}}: {key} must be {wanted}.")


def check_used(given: Mapping[str, Any], variant: str, config: type, options: Sequence[str]) -> None:
    """Raise `ValueError` for an answer that a variant of this config has no use for."""
    fields = {one.name for one in dataclasses.fields(config)}
    for key in given:
        lacks = key in _OF_VARIANTS and variant not in _OF_VARIANTS[key]
        if lacks or (key in options and key not in fields):
            raise ValueError(
                f"assume has {key!r}, for which a {variant} has no use: omit it, or assume another variant."
            )
