"""Goodfire's SAEs: one torch file with `encoder_linear.*` and `decoder_linear.*` (Llama 3.1 and 3.3), or `encoder.*` and
`decoder.*` (DeepSeek R1 distilled). ReLU; b_dec is not subtracted.
"""

from __future__ import annotations

import re
from typing import Any

from saelab.errors import SaelabError
from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.source import Source

NAME = "goodfire"
WANTS = "one .pt or .pth file with encoder_linear.weight, decoder_linear.weight and their biases"
_PREFIXES = (("encoder_linear", "decoder_linear"), ("encoder", "decoder"))


def matches(source: Source) -> bool:
    found = [name for name in source.tensor_files if name.endswith((".pt", ".pth"))]
    if len(found) != 1 or re.search(r"(?:^|/)ae(?:_\d+)?\.pt$", found[0]):
        return False
    return _prefixes(set(source.tensors(found[0]))) is not None


def load(source: Source, answers: Answers) -> Blueprint:
    name = source.tensor_files[0]
    tensors = source.tensors(name)
    prefixes = _prefixes(set(tensors))
    if prefixes is None:
        raise SaelabError(
            f"{source.label} has no encoder_linear and decoder_linear with biases: it has {', '.join(tensors)}."
        )
    encoder, decoder = prefixes
    return Blueprint(
        variant="relu",
        W_enc=tensors[f"{encoder}.weight"].float(),
        W_dec=tensors[f"{decoder}.weight"].float().T.contiguous(),
        b_enc=tensors[f"{encoder}.bias"],
        b_dec=tensors[f"{decoder}.bias"],
        origin=_origin(source.label),
    )


def _prefixes(names: set[str]) -> tuple[str, str] | None:
    for encoder, decoder in _PREFIXES:
        if {f"{part}.{kind}" for part in (encoder, decoder) for kind in ("weight", "bias")} <= names:
            return encoder, decoder
    return None


def _origin(label: str) -> dict[str, Any]:
    origin: dict[str, Any] = {"prepend_bos": True}
    if layer := re.search(r"-?[lL](\d+)\b", label.rpartition("/")[2]):
        origin["hook_name"] = f"blocks.{layer.group(1)}.hook_resid_post"
    for named, model in (
        ("Llama-3.3-70B", "meta-llama/Llama-3.3-70B-Instruct"),
        ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
        ("DeepSeek-R1", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    ):
        if named in label:
            origin["model"] = {"name": model}
    return origin
