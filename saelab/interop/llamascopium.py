"""llamascopium (OpenMOSS): `config.json` with `sae_weights.safetensors` or `.pt`, or `checkpoints/final.*`. SAEs, transcoders
(two hook points) and crosscoders of one gate per token.

With norm_activation "dataset-wise" inputs and outputs have scales of their own, kept in the weights file. With
sparsity_include_decoder_norm the gate compares u times the norm of the feature's decoder row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saelab.errors import SaelabError
from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.llama_scope import by_decoder_norm, scales
from saelab.interop.source import Source, check_present

NAME = "llamascopium"
WANTS = "config.json (with sae_type) and sae_weights.safetensors, sae_weights.pt or checkpoints/final.*"
_WEIGHTS = ("sae_weights.safetensors", "sae_weights.pt", "checkpoints/final.safetensors", "checkpoints/final.pt")
_NORM = "dataset_average_activation_norm."


def matches(source: Source) -> bool:
    return (
        source.has("config.json")
        and not source.has("cfg.json")
        and any(source.has(name) for name in _WEIGHTS)
        and "sae_type" in source.json("config.json")
    )


def load(source: Source, answers: Answers) -> Blueprint:
    cfg = source.json("config.json")
    if cfg["sae_type"] not in ("sae", "crosscoder"):
        raise SaelabError(f"{source.label} has sae_type={cfg['sae_type']!r}; saelab reads sae and crosscoder.")
    if cfg.get("use_glu_encoder"):
        raise SaelabError(f"{source.label} has a GLU encoder (use_glu_encoder), which saelab does not read.")
    name = next(name for name in _WEIGHTS if source.has(name))
    tensors = {key.removeprefix("sae."): tensor for key, tensor in source.tensors(name).items()}
    check_present(tensors, ("W_E", "W_D", "b_E"), f"{source.label}: {name}")
    if cfg["sae_type"] == "crosscoder":
        return _crosscoder(cfg, tensors, source)
    W_enc, W_dec = tensors["W_E"].float().T.contiguous(), tensors["W_D"].float()
    origin = _origin(cfg)
    transcodes = "hook_name_out" in origin
    scaled = _scaling(cfg, tensors, W_enc, W_dec, answers, source)
    return Blueprint(
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=tensors["b_E"],
        b_dec=tensors.get("b_D"),
        origin=origin,
        **_selection(cfg, tensors, W_dec, transcodes, answers, source.label),
        **({**scaled, "scale_out": scaled.get("scale_out") if transcodes else None} if scaled else {}),
    )


def _crosscoder(cfg: dict[str, Any], tensors: dict[str, Tensor], source: Source) -> Blueprint:
    """One z for all heads, as it is with ReLU alone: any other gate compares u times the head's own decoder norm, so that a
    feature may fire in one head and not in another."""
    if str(cfg.get("act_fn", "relu")).lower() != "relu":
        raise SaelabError(
            f"{source.label} is a crosscoder with act_fn={cfg.get('act_fn')!r}, whose heads each have a gate of their own; "
            "saelab reads crosscoders with relu."
        )
    hooks = tuple(cfg.get("hook_points") or ())
    return Blueprint(
        variant="crosscoder",
        W_enc=tensors["W_E"].float().transpose(1, 2).contiguous(),
        W_dec=tensors["W_D"].float(),
        b_enc=tensors["b_E"].float().sum(0),
        b_dec=tensors.get("b_D"),
        scale=_scales_of_heads(cfg, tensors, hooks, source.label),
        options={"sparsity": "l1", "hook_names": hooks or None},
        origin={"hook_names": list(hooks), "hook_name": hooks[-1]} if hooks else {},
    )


def _scales_of_heads(cfg: dict[str, Any], tensors: dict[str, Tensor], hooks: tuple[str, ...], where: str) -> Tensor:
    how = cfg.get("norm_activation", "dataset-wise")
    if how == "inference":
        return torch.ones(len(tensors["W_E"]))
    norms = [tensors[f"{_NORM}{hook}"].float().reshape(()) for hook in hooks if f"{_NORM}{hook}" in tensors]
    if how != "dataset-wise" or len(norms) != len(tensors["W_E"]):
        raise SaelabError(
            f"{where} is a crosscoder with norm_activation={how!r} and {len(norms)} average norms for {len(tensors['W_E'])} "
            "heads; saelab reads dataset-wise, with a norm for each of hook_points, and inference."
        )
    return tensors["W_E"].shape[1] ** 0.5 / torch.stack(norms)


def _selection(
    cfg: dict[str, Any], tensors: dict[str, Tensor], W_dec: Tensor, transcodes: bool, answers: Answers, where: str
) -> dict[str, Any]:
    act_fn, by_norm = str(cfg.get("act_fn", "relu")).lower(), cfg.get("sparsity_include_decoder_norm", True)
    if act_fn == "relu":  # a gate at 0 is the same in any unit
        return {"variant": "relu_transcoder" if transcodes else "relu"}
    if act_fn == "topk" and not transcodes:
        score = {"score": "decoder_norm"} if by_norm else {}
        return {"variant": "topk", "k": int(answers.need("k", cfg.get("top_k"), where)), "options": score}
    if act_fn == "jumprelu":
        log_threshold = tensors.get("activation_function.log_jumprelu_threshold", tensors.get("log_jumprelu_threshold"))
        threshold = answers.need("threshold", None if log_threshold is None else log_threshold.float().exp(), where)
        threshold = by_decoder_norm(threshold, W_dec) if by_norm else threshold
        return {"variant": "jumprelu_transcoder" if transcodes else "jumprelu", "threshold": threshold}
    raise SaelabError(
        f"{where} has act_fn={act_fn!r}{' as a transcoder' if transcodes else ''}; saelab reads relu, jumprelu and, of SAEs, "
        "topk. (batchtopk keeps no threshold, so its activations depend on the batch.)"
    )


def _scaling(
    cfg: dict[str, Any], tensors: dict[str, Tensor], W_enc: Tensor, W_dec: Tensor, answers: Answers, source: Source
) -> dict[str, Any]:
    how = cfg.get("norm_activation", "dataset-wise")
    if how == "inference":
        return {}
    if how == "token-wise":
        return {"normalize": "constant_norm"}
    if how != "dataset-wise":
        raise SaelabError(
            f"{source.label} has norm_activation={how!r}, with which a token depends on its batch; saelab reads dataset-wise, "
            "token-wise and inference."
        )
    norms = {key.removeprefix(_NORM): float(value) for key, value in tensors.items() if key.startswith(_NORM)}
    hooks = cfg.get("hook_point_in", ""), cfg.get("hook_point_out", "")
    scale, scale_out = scales(norms, hooks, W_enc, W_dec, answers, source)
    return {"scale": scale, "scale_out": scale_out}


def _origin(cfg: dict[str, Any]) -> dict[str, Any]:
    hook_in, hook_out = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    origin: dict[str, Any] = {"hook_name": hook_in} if hook_in else {}
    return origin | ({"hook_name_out": hook_out} if hook_out not in (None, hook_in) else {})
