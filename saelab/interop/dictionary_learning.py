"""dictionary_learning: `ae.pt` (or `checkpoints/ae_STEP.pt`) and `config.json` with a trainer and a buffer. The class of the
dictionary stands in `config.json`; without it the tensors' names tell. Only what encodes is read from the pickle.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import Tensor

from saelab.errors import SaelabError
from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.source import Source, read_object

NAME = "dictionary_learning"
WANTS = "ae.pt (or ae_STEP.pt) with config.json beside it or above it"
_FILE = re.compile(r"(?:^|/)ae(?:_\d+)?\.pt$")
_HOOKS = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}


def matches(source: Source) -> bool:
    return len(_files(source)) > 0


def load(source: Source, answers: Answers) -> Blueprint:
    found = _files(source)
    if len(found) > 1:
        raise SaelabError(
            f"{source.label} holds {len(found)} dictionaries ({', '.join(found[:5])}): name one of these files."
        )
    tensors, config = source.tensors(found[0]), _config(source)
    trainer, buffer = config.get("trainer", {}), config.get("buffer", {})
    kind = trainer.get("dict_class") or _class_of(tensors, source.label)
    if kind not in _READERS:
        raise SaelabError(f"{source.label} holds the class {kind}; saelab reads {', '.join(_READERS)}.")
    try:
        plan = _READERS[kind](tensors, answers, source.label)
    except KeyError as error:
        raise SaelabError(
            f"{source.label} is said to be a {kind}, but its tensors lack {error}: check config.json."
        ) from error
    return dataclasses.replace(plan, origin=_origin(trainer, buffer))


def _files(source: Source) -> list[str]:
    if source.only:
        return [source.only] if _FILE.search(source.only) else []
    top = [name for name in source.names if name == "ae.pt"]
    return top or [name for name in source.names if _FILE.search(name) and name.count("/") <= 1]


def _config(source: Source) -> dict[str, Any]:
    if source.has("config.json"):
        return source.json("config.json")
    above = source.above("config.json")  # of checkpoints/ae_STEP.pt
    return read_object(above) if above else {}


def _class_of(tensors: dict[str, Tensor], where: str) -> str:
    if "group_sizes" in tensors:
        return "MatryoshkaBatchTopKSAE"
    if "r_mag" in tensors:
        return "GatedAutoEncoder"
    if "W_enc" in tensors and "threshold" in tensors:
        return "JumpReluAutoEncoder"
    if "encoder.weight" in tensors and "k" in tensors:
        raise SaelabError(
            f"{where} has no config.json, which tells an AutoEncoderTopK (k per token) from a BatchTopKSAE (a threshold): put it "
            'beside the file, with {"trainer": {"dict_class": "AutoEncoderTopK"}} or the other.'
        )
    return "AutoEncoder" if "bias" in tensors else "AutoEncoderNew"


def _linear(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"W_enc": tensors["encoder.weight"].float(), "W_dec": tensors["decoder.weight"].float().T.contiguous()}


def _matrices(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "W_enc": tensors["W_enc"].float().T.contiguous(),
        "W_dec": tensors["W_dec"].float(),
        "b_enc": tensors["b_enc"],
        "b_dec": tensors["b_dec"],
    }


def _k(tensors: dict[str, Tensor], answers: Answers, where: str) -> int:
    found = tensors.get("k")
    return int(answers.need("k", None if found is None else int(found), where))


def _threshold(tensors: dict[str, Tensor], answers: Answers, where: str) -> float:
    """-1 stands for one that training never set."""
    found = float(tensors["threshold"])
    return float(
        answers.need("threshold", None if found < 0 else found, f"{where} (its threshold is {found:g}, never set)")
    )


def _relu(tensors: dict[str, Tensor], answers: Answers, where: str) -> Blueprint:
    return Blueprint(
        variant="relu", **_linear(tensors), b_enc=tensors["encoder.bias"], b_dec=tensors["bias"], pre_bias=True
    )


def _relu_new(tensors: dict[str, Tensor], answers: Answers, where: str) -> Blueprint:
    biases: dict[str, Any] = {"b_enc": tensors["encoder.bias"], "b_dec": tensors["decoder.bias"]}
    return Blueprint(variant="relu", **_linear(tensors), **biases)


def _gated(tensors: dict[str, Tensor], answers: Answers, where: str) -> Blueprint:
    biases: dict[str, Any] = {"b_enc": tensors["gate_bias"], "b_dec": tensors["decoder_bias"]}
    gate = {"b_mag": tensors["mag_bias"], "r_mag": tensors["r_mag"]}
    return Blueprint(variant="gated", **_linear(tensors), **biases, pre_bias=True, tensors=gate)


def _topk(tensors: dict[str, Tensor], answers: Answers, where: str) -> Blueprint:
    """k per token: the threshold that is saved too is used only where a caller asks for it."""
    biases: dict[str, Any] = {"b_enc": tensors["encoder.bias"], "b_dec": tensors["b_dec"]}
    return Blueprint(variant="topk", **_linear(tensors), **biases, k=_k(tensors, answers, where), pre_bias=True)


def _batch_topk(tensors: dict[str, Tensor], answers: Answers, where: str) -> Blueprint:
    biases: dict[str, Any] = {"b_enc": tensors["encoder.bias"], "b_dec": tensors["b_dec"]}
    found: dict[str, Any] = {"k": _k(tensors, answers, where), "threshold": _threshold(tensors, answers, where)}
    return Blueprint(variant="batch_topk", **_linear(tensors), **biases, **found, pre_bias=True)


def _matryoshka(tensors: dict[str, Tensor], answers: Answers, where: str) -> Blueprint:
    sizes = tensors["group_sizes"].tolist()
    found: dict[str, Any] = {"k": _k(tensors, answers, where), "threshold": _threshold(tensors, answers, where)}
    options = {"group_fractions": tuple(size / sum(sizes) for size in sizes)}
    return Blueprint(variant="matryoshka", **_matrices(tensors), **found, pre_bias=True, options=options)


def _jumprelu(tensors: dict[str, Tensor], answers: Answers, where: str) -> Blueprint:
    return Blueprint(variant="jumprelu", **_matrices(tensors), threshold=tensors["threshold"])


_READERS = {
    "AutoEncoder": _relu,
    "AutoEncoderNew": _relu_new,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
}


def _origin(trainer: dict[str, Any], buffer: dict[str, Any]) -> dict[str, Any]:
    origin: dict[str, Any] = {}
    if trainer.get("lm_name"):
        origin["model"] = {"name": str(trainer["lm_name"])}
    if trainer.get("layer") is not None:
        named = str(trainer.get("submodule_name") or "resid_post")
        kind = next((hook for part, hook in _HOOKS.items() if part in named), "hook_resid_post")
        origin["hook_name"] = f"blocks.{int(trainer['layer'])}.{kind}"
    if buffer.get("ctx_len"):
        origin["ctx_len"] = int(buffer["ctx_len"])
    return origin
