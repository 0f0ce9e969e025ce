"""dictionary_learning: `ae.pt` (or `checkpoints/ae_STEP.pt`) and `config.json` with a trainer and a buffer. The class of the
dictionary stands in `config.json`; without it the tensors' names tell. Only what encodes is read from the pickle.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import SaelabError
from saelab.files import atomic_path, atomic_write_json
from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.describing import as_thresholds, refuse, with_pre_bias
from saelab.interop.names import layer_of
from saelab.interop.pickles import save_pickle
from saelab.interop.source import Source, read_object
from saelab.interop.values import check_sizes, integer

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
    check_sizes(trainer, {"activation_dim": plan.d_in, "dict_size": plan.d_sae}, source.label)
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
    return integer(answers.need("k", None if found is None else found.item(), where), "k", where)


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


def save(plan: Blueprint, folder: Path) -> None:
    """Write `ae.pt`, a torch file of plain tensors, and `config.json`. Raises `SaelabError` for what it cannot hold."""
    if plan.normalize != "none":
        raise refuse(NAME, f"normalize={plan.normalize!r}")
    if plan.options.get("select", "topk") != "topk" or plan.options.get("score", "value") != "value":
        raise refuse(NAME, "a TopK other than that of the k largest pre-activations")
    kind, plan = _class_for(plan)
    tensors = _TENSORS[kind](plan)
    trainer = {"dict_class": kind, "activation_dim": plan.d_in, "dict_size": plan.d_sae, "k": plan.k}
    origin = plan.origin
    trainer |= {
        "lm_name": (origin.get("model") or {}).get("name"),
        "layer": layer_of(str(origin.get("hook_name")), r"blocks\.(\d+)"),
    }
    trainer |= {"submodule_name": str(origin.get("hook_name") or "").rpartition("hook_")[2] or None}
    config = {"trainer": {key: value for key, value in trainer.items() if value is not None}}
    config["buffer"] = {"ctx_len": origin["ctx_len"]} if origin.get("ctx_len") else {}
    with atomic_path(folder / "ae.pt") as path:
        save_pickle(tensors, path)
    atomic_write_json(folder / "config.json", config)


def _class_for(plan: Blueprint) -> tuple[str, Blueprint]:
    """The class that computes this, and the blueprint with b_dec subtracted as that class does."""
    scalar = plan.threshold is not None and torch.as_tensor(plan.threshold).numel() == 1
    if plan.variant in ("batch_topk", "mutual_choice") and scalar:
        return "BatchTopKSAE", with_pre_bias(plan, True)
    if plan.variant == "matryoshka" and scalar:
        return "MatryoshkaBatchTopKSAE", with_pre_bias(plan, True)
    if plan.variant == "topk":
        return "AutoEncoderTopK", with_pre_bias(plan, True)
    if plan.variant == "gated":
        return "GatedAutoEncoder", with_pre_bias(plan, True)
    if plan.variant == "relu":
        return ("AutoEncoder" if plan.pre_bias else "AutoEncoderNew"), plan
    if plan.variant in ("jumprelu", "feature_choice"):
        return "JumpReluAutoEncoder", with_pre_bias(as_thresholds(plan), False)
    raise refuse(NAME, f"a {plan.variant}")


def _linear_of(plan: Blueprint) -> dict[str, Tensor]:
    return {"encoder.weight": plan.W_enc, "decoder.weight": plan.W_dec.T}


def _matrices_of(plan: Blueprint) -> dict[str, Tensor]:
    return {"W_enc": plan.W_enc.T, "W_dec": plan.W_dec, "b_enc": _b_enc(plan), "b_dec": _b_dec(plan)}


def _b_enc(plan: Blueprint) -> Tensor:
    return torch.zeros(plan.d_sae) if plan.b_enc is None else plan.b_enc


def _b_dec(plan: Blueprint) -> Tensor:
    return torch.zeros(plan.d_out) if plan.b_dec is None else plan.b_dec


def _counts(plan: Blueprint) -> dict[str, Tensor]:
    """k, and the threshold (-1: none)."""
    threshold = -1.0 if plan.threshold is None else float(torch.as_tensor(plan.threshold))
    return {"k": torch.tensor(plan.k, dtype=torch.int32), "threshold": torch.tensor(threshold)}


def _groups(plan: Blueprint) -> Tensor:
    ends = torch.tensor(plan.options["group_fractions"], dtype=torch.float64).cumsum(0) * plan.d_sae
    return ends.round().long().diff(prepend=torch.zeros(1, dtype=torch.int64))


_TENSORS: dict[str, Any] = {
    "AutoEncoder": lambda plan: _linear_of(plan) | {"encoder.bias": _b_enc(plan), "bias": _b_dec(plan)},
    "AutoEncoderNew": lambda plan: _linear_of(plan) | {"encoder.bias": _b_enc(plan), "decoder.bias": _b_dec(plan)},
    "AutoEncoderTopK": lambda plan: (
        _linear_of(plan) | {"encoder.bias": _b_enc(plan), "b_dec": _b_dec(plan)} | _counts(plan)
    ),
    "BatchTopKSAE": lambda plan: (
        _linear_of(plan) | {"encoder.bias": _b_enc(plan), "b_dec": _b_dec(plan)} | _counts(plan)
    ),
    "MatryoshkaBatchTopKSAE": lambda plan: _matrices_of(plan) | _counts(plan) | {"group_sizes": _groups(plan)},
    "JumpReluAutoEncoder": lambda plan: _matrices_of(plan) | {"threshold": plan.threshold},
    "GatedAutoEncoder": lambda plan: (
        _linear_of(plan)
        | {
            "decoder_bias": _b_dec(plan),
            "gate_bias": _b_enc(plan),
            "mag_bias": plan.tensors["b_mag"],
            "r_mag": plan.tensors["r_mag"],
        }
    ),
}
