"""Reference implementation of `encode_groupmax`, its specification: dense pre-activations and a maximum per group."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def encode_groupmax(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    norms: Float[Tensor, " d_sae"] | None = None,
    center: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """Dense feature activations: the largest positive score of each of k groups, ties to the lowest id."""
    pre_acts = (x if center is None else x - center) @ W_enc.T + b_enc
    scores = pre_acts if norms is None else pre_acts * norms
    grouped = scores.view(len(x), k, -1)
    kept = grouped.argmax(2) + torch.arange(k, device=x.device) * grouped.shape[2]
    mask = torch.zeros_like(pre_acts, dtype=torch.bool).scatter(1, kept, True)
    return torch.where(mask & (scores > 0), pre_acts, 0)
