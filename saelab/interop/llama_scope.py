"""Llama Scope (He et al. 2024): `hyperparams.json` and `checkpoints/final.safetensors`. JumpReLU with one threshold for all
features, in units of activations whose average norm is sqrt(d_model): inputs are scaled by sqrt(d_model) / average norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.source import Source, check_present

NAME = "llama_scope"
WANTS = "hyperparams.json and checkpoints/final.safetensors"
_WEIGHTS = "checkpoints/final.safetensors"


def matches(source: Source) -> bool:
    return source.has("hyperparams.json", _WEIGHTS)


def load(source: Source, answers: Answers) -> Blueprint:
    cfg, tensors = source.json("hyperparams.json"), source.tensors(_WEIGHTS)
    check_present(tensors, ("encoder.weight", "encoder.bias", "decoder.weight"), f"{source.label}: {_WEIGHTS}")
    origin, W_enc = _origin(cfg), tensors["encoder.weight"].float()
    W_dec = tensors["decoder.weight"].float().T.contiguous()
    threshold = float(answers.need("threshold", cfg.get("jump_relu_threshold"), source.label))
    scale, scale_out = scales(cfg.get("dataset_average_activation_norm"), ("in", "out"), W_enc, W_dec, answers, source)
    return Blueprint(
        variant="jumprelu_transcoder" if "hook_name_out" in origin else "jumprelu",
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=tensors["encoder.bias"],
        b_dec=tensors.get("decoder.bias"),
        threshold=by_decoder_norm(threshold, W_dec) if cfg.get("sparsity_include_decoder_norm") else threshold,
        scale=scale,
        scale_out=scale_out if "hook_name_out" in origin else None,
        origin=origin,
    )


def scales(
    norms: Mapping[str, float] | None,
    keys: tuple[str, str],
    W_enc: Tensor,
    W_dec: Tensor,
    answers: Answers,
    source: Source,
) -> tuple[float, float]:
    """sqrt(width) over the average norm, of the hook that is read and of the one that is written."""
    found = [None if not (norms or {}).get(key) else float((norms or {})[key]) for key in keys]
    widths = W_enc.shape[1], W_dec.shape[1]
    known = [None if norm is None else math.sqrt(width) / norm for norm, width in zip(found, widths, strict=True)]
    scale = float(answers.need("scale", known[0], f"{source.label} (dataset_average_activation_norm)"))
    return scale, scale if known[1] is None else known[1]


def by_decoder_norm(threshold: float | Tensor, W_dec: Tensor) -> Tensor:
    """The threshold of u where u times the norm of the decoder row is compared with `threshold`."""
    return threshold / W_dec.norm(dim=1).clamp_min(1e-12)


def _origin(cfg: dict[str, Any]) -> dict[str, Any]:
    origin: dict[str, Any] = {"prepend_bos": True, "ctx_len": 1024, "model": {"name": "meta-llama/Llama-3.1-8B"}}
    if cfg.get("hook_point_in"):
        origin["hook_name"] = cfg["hook_point_in"]
    if cfg.get("hook_point_out") not in (None, cfg.get("hook_point_in")):
        origin["hook_name_out"] = cfg["hook_point_out"]
    return origin
