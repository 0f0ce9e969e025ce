"""Gemma Scope 1 (Lieberum et al. 2024): `params.npz` in `layer_N/width_W/average_l0_L` of a repository such as
google/gemma-scope-2b-pt-res. JumpReLU SAEs that do not subtract b_dec; `-transcoders` repositories hold transcoders.

SAEs of the embeddings were trained before Gemma multiplies them by sqrt(d_model), `hook_embed` is what comes after: their W_enc
is divided by sqrt(d_model) and their W_dec multiplied, as SAELens does.
"""

from __future__ import annotations

import re
from typing import Any

from saelab.errors import SaelabError
from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.names import layer_of
from saelab.interop.source import Source, check_present

NAME = "gemma_scope"
WANTS = "params.npz"
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def matches(source: Source) -> bool:
    return source.has("params.npz") if source.only is None else source.only.endswith(".npz")


def load(source: Source, answers: Answers) -> Blueprint:
    found = {key.lower(): value for key, value in source.tensors(source.only or "params.npz").items()}
    check_present(found, [name.lower() for name in _TENSORS], f"{source.label}: params.npz")
    if "scaling_factor" in found and not bool((found["scaling_factor"] == 1).all()):
        raise SaelabError(f"{source.label} has a scaling_factor other than 1, which saelab does not read.")
    tensors = {name: found[name.lower()] for name in _TENSORS}
    kind, origin = kind_of(source.label)
    if "model" not in origin and "hook_name" in origin:  # without the repository's name
        origin["hook_name"] = answers.assume("hook_name", origin["hook_name"])
    W_enc, W_dec = tensors["W_enc"].float().T.contiguous(), tensors["W_dec"].float()
    size = W_enc.shape[1] ** 0.5 if kind == "embedding" else 1.0
    return Blueprint(
        variant="jumprelu_transcoder" if kind == "transcoders" else "jumprelu",
        W_enc=W_enc / size,
        W_dec=W_dec * size,
        b_enc=tensors["b_enc"],
        b_dec=tensors["b_dec"],
        threshold=tensors["threshold"],
        origin=origin,
    )


def kind_of(label: str) -> tuple[str, dict[str, Any]]:
    """The kind of SAE ("res", "mlp", "att", "transcoders", "embedding") and what its path says of model, hook and L0."""
    repo = re.search(r"gemma-scope-([0-9]+b)-(pt|it)-([a-z]+)", label)
    layer = layer_of(label)
    kind = "embedding" if "embedding" in label else repo.group(3) if repo else "res"
    hooks = {
        "res": (f"blocks.{layer}.hook_resid_post",),
        "mlp": (f"blocks.{layer}.hook_mlp_out",),
        "att": (f"blocks.{layer}.attn.hook_z",),
        "transcoders": (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"),
        "embedding": ("hook_embed",),
    }
    origin: dict[str, Any] = {"prepend_bos": True, "ctx_len": 1024}
    if kind in hooks and (layer is not None or kind == "embedding"):
        origin |= dict(zip(("hook_name", "hook_name_out"), hooks[kind], strict=False))
    if repo:
        size, tuned, _ = repo.groups()
        origin["model"] = {"name": f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}"}
    if claim := re.search(r"average_l0_(\d+)", label):
        origin["claims"] = {"l0": float(claim.group(1))}
    return kind, origin
