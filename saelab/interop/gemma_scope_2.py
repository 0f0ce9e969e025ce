"""Gemma Scope 2: `config.json` and `params.safetensors` in folders such as `resid_post/layer_9_width_16k_l0_medium`; where
config.json is missing, the names of repository and folder tell model, layer and kind. JumpReLU, b_dec not subtracted.

A cross-layer transcoder (`clt/NAME.safetensors`, `w_dec (d_sae, n_layers, d_out)`) is read as the encoder of its layer with the
decoder to the same layer: its features can be browsed, but a layer's output is the sum over the decoders of all earlier layers,
so FVU, loss and steering of one of them mean nothing.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from saelab.errors import SaelabError
from saelab.files import atomic_save_safetensors, atomic_write_json
from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.describing import as_thresholds, refuse, with_pre_bias
from saelab.interop.names import hook_of_module, layer_of, model_id, module_of_hook
from saelab.interop.source import Source, check_present

NAME = "gemma_scope_2"
WANTS = "params.safetensors (and config.json), or clt/NAME.safetensors"
_TENSORS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
_KINDS = {
    "resid_post": "output",
    "attn_out": "self_attn.o_proj.input",
    "mlp_out": "post_feedforward_layernorm.output",
    "transcoder": "pre_feedforward_layernorm.output",
    "clt": "pre_feedforward_layernorm.output",
}
_OUT = "post_feedforward_layernorm.output"


def matches(source: Source) -> bool:
    if source.only is None:
        return source.has("params.safetensors")
    return PurePosixPath(source.only).name == "params.safetensors" or "/clt" in source.label


def load(source: Source, answers: Answers) -> Blueprint:
    name = source.only or "params.safetensors"
    found = source.tensors(name)
    check_present(found, _TENSORS, f"{source.label}: {name}")
    config = source.json("config.json") if source.has("config.json") else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise SaelabError(f"{source.label} has architecture={config['architecture']!r}; Gemma Scope 2 has jump_relu.")
    origin = _origin(source.label, config)
    skip = found.get("affine_skip_connection")
    if config.get("affine_connection") and skip is None:
        raise SaelabError(
            f"{source.label}: config.json says affine_connection, but there is no affine_skip_connection."
        )
    W_dec, decoders = found["w_dec"].float(), None
    if W_dec.ndim == 3:
        W_dec, decoders = _same_layer(W_dec, source.label), W_dec.shape[1]
    transcodes = "hook_name_out" in origin or skip is not None
    if decoders is not None:
        origin["partial"] = cross_layer(decoders)
    return Blueprint(
        variant="jumprelu_transcoder" if transcodes else "jumprelu",
        W_enc=found["w_enc"].float().T.contiguous(),
        W_dec=W_dec.contiguous(),
        b_enc=found["b_enc"],
        b_dec=found["b_dec"] if found["b_dec"].ndim == 1 else found["b_dec"][_layer(source.label)],
        W_skip=None if skip is None else skip.float().T.contiguous(),
        threshold=found["threshold"],
        origin=origin,
    )


def cross_layer(n_layers: int) -> str:
    """Why a layer of a cross-layer transcoder cannot be scored or steered."""
    return (
        f"it is one layer of a cross-layer transcoder ({n_layers} decoders), whose outputs are sums over the features of all "
        "earlier layers; alone it reconstructs nothing. Its features can be collected and browsed"
    )


def _same_layer(W_dec: Tensor, label: str) -> Tensor:
    layer = _layer(label)
    if not 0 <= layer < W_dec.shape[1]:
        raise SaelabError(f"{label}: layer {layer} has no decoder among {W_dec.shape[1]}.")
    return W_dec[:, layer]


def _layer(label: str) -> int:
    layer = layer_of(label)
    if layer is None:
        raise SaelabError(
            f"{label} does not say its layer (layer_N in the path): keep the names of the repository's folders."
        )
    return layer


def _origin(label: str, config: dict[str, Any]) -> dict[str, Any]:
    origin: dict[str, Any] = {"prepend_bos": True, "ctx_len": 1024}
    near = "/".join(label.split("/")[-3:])
    layer, kind = layer_of(label), next((kind for kind in _KINDS if kind in near), None)
    inside = f"model.layers.{layer}"
    point_in = config.get("hf_hook_point_in") or (f"{inside}.{_KINDS[kind]}" if kind and layer is not None else None)
    point_out = config.get("hf_hook_point_out") or (f"{inside}.{_OUT}" if kind in ("transcoder", "clt") else None)
    if hook := config.get("hook_name") or (point_in and hook_of_module(point_in)):
        origin["hook_name"] = hook
    if hook := config.get("hook_name_out") or (point_out and hook_of_module(point_out)):
        origin["hook_name_out"] = hook
    if "prepend_bos" in config:
        origin["prepend_bos"] = bool(config["prepend_bos"])
    name = config.get("model_name") or _model_of(label)
    if name:
        name = str(name).replace("-v3", "-3")
        name = name.replace("-pt", "") if "270m" in name else name
        origin["model"] = {"name": model_id(name)}
    if claim := re.search(r"_l0_(\d+)", label):
        origin["claims"] = {"l0": float(claim.group(1))}
    return {key: value for key, value in origin.items() if value is not None}


def _model_of(label: str) -> str | None:
    found = re.search(r"gemma-scope-2-([0-9]+[mb]-(?:pt|it))", label)
    return f"google/gemma-3-{found.group(1)}" if found else None


def save(plan: Blueprint, folder: Path) -> None:
    """Write any SAE or transcoder with a threshold, or ReLU, as JumpReLU. Raises `SaelabError` for what it cannot hold."""
    plan = as_thresholds(plan)
    if plan.variant not in ("jumprelu", "jumprelu_transcoder"):
        raise refuse(NAME, f"a {plan.variant} (only thresholds)")
    if plan.normalize != "none":
        raise refuse(NAME, f"normalize={plan.normalize!r}")
    if plan.variant == "jumprelu":
        plan = with_pre_bias(plan, False)
    elif not plan.origin.get("hook_name_out"):
        raise refuse(
            NAME, "a transcoder that does not name the hook it predicts (hook_name_out), by which it is known there"
        )
    tensors = {
        "w_enc": plan.W_enc.T,
        "w_dec": plan.W_dec,
        "b_enc": torch.zeros(plan.d_sae) if plan.b_enc is None else plan.b_enc,
        "b_dec": torch.zeros(plan.d_out) if plan.b_dec is None else plan.b_dec,
        "threshold": torch.as_tensor(plan.threshold, dtype=torch.float32).expand(plan.d_sae),
    }
    tensors |= {} if plan.W_skip is None else {"affine_skip_connection": plan.W_skip.T}
    origin = plan.origin
    config: dict[str, Any] = {"architecture": "jump_relu", "model_name": (origin.get("model") or {}).get("name")}
    hooks = origin.get("hook_name"), origin.get("hook_name_out")
    config |= {"hf_hook_point_in": module_of_hook(hooks[0], config["model_name"]), "hook_name": hooks[0]}
    if plan.variant == "jumprelu_transcoder":
        config |= {"hf_hook_point_out": module_of_hook(hooks[1], config["model_name"]), "hook_name_out": hooks[1]}
        config["affine_connection"] = plan.W_skip is not None
    if origin.get("prepend_bos") is not None:
        config["prepend_bos"] = bool(origin["prepend_bos"])
    atomic_save_safetensors(folder / "params.safetensors", {k: v.float().contiguous() for k, v in tensors.items()})
    atomic_write_json(folder / "config.json", {key: value for key, value in config.items() if value is not None})
