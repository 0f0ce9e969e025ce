"""Exact changes of a blueprint that leave the function of the SAE as it is: other units of its features or of its input."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from saelab.errors import SaelabError
from saelab.interop.blueprint import Blueprint
from saelab.interop.source import check_present


def fold_decoder_norms(plan: Blueprint) -> Blueprint:
    """Decoder rows at norm 1, and feature activations multiplied by the norms they had."""
    if plan.variant == "matching_pursuit":
        raise SaelabError("The decoder norms of a matching pursuit SAE cannot be folded: its encoder is its decoder.")
    norms = plan.W_dec.float().norm(dim=1).clamp_min(1e-8)
    threshold = plan.threshold
    if threshold is not None:
        threshold = torch.as_tensor(threshold, dtype=torch.float32).expand(plan.d_sae) * norms
    return dataclasses.replace(
        plan,
        W_enc=plan.W_enc * norms[:, None],
        W_dec=plan.W_dec / norms[:, None],
        b_enc=None if plan.b_enc is None else plan.b_enc * norms,
        threshold=threshold,
        tensors={name: tensor * norms if name == "b_mag" else tensor for name, tensor in plan.tensors.items()},
    )


def fold_whitening(plan: Blueprint, whitening: Mapping[str, Tensor]) -> Blueprint:
    """An SAE of whitened activations `(x - mean) M` as one of raw activations (`mean`, `matrix` M, `inverse_matrix`)."""
    check_present(whitening, ("mean", "matrix", "inverse_matrix"), "activation_whitening.safetensors")
    if plan.variant == "matching_pursuit":
        raise SaelabError(
            "A matching pursuit SAE of whitened activations has no form for raw ones: its encoder is tied."
        )
    mean, M, inverse = (whitening[name].double() for name in ("mean", "matrix", "inverse_matrix"))
    W_enc, W_dec = plan.W_enc.double() @ M.T, plan.W_dec.double() @ inverse
    b_dec = inverse.new_zeros(len(mean)) if plan.b_dec is None else plan.b_dec.double() @ inverse
    b_enc = plan.b_enc
    shift = W_enc @ mean
    tensors = dict(plan.tensors)
    if not plan.pre_bias:  # otherwise the new b_dec subtracts the mean
        b_enc = -shift if b_enc is None else b_enc.double() - shift
        if "b_mag" in tensors:
            tensors["b_mag"] = tensors["b_mag"].double() - tensors["r_mag"].double().exp() * shift
    return dataclasses.replace(
        plan,
        W_enc=W_enc.float(),
        W_dec=W_dec.float(),
        b_enc=None if b_enc is None else b_enc.float(),
        b_dec=(b_dec + mean).float(),
        tensors={name: tensor.float() for name, tensor in tensors.items()},
    )
