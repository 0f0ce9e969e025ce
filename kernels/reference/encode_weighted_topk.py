"""Reference implementation of `encode_weighted_topk`: dense pre-activations, weighted, and one sort per row."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def encode_weighted_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    weights: Float[Tensor, "batch d_sae"],
    center: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """Dense feature activations: the k largest positive products of pre-activation and weight, ties to the lowest id."""
    pre_acts = (x if center is None else x - center) @ W_enc.T + b_enc
    scores = pre_acts * weights
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    mask = torch.zeros_like(pre_acts, dtype=torch.bool).scatter(1, kept, True)
    return torch.where(mask & (scores > 0), pre_acts, 0)
