"""Reference implementation of `encode_feature_topk`: dense pre-activations and one sort per column."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def encode_feature_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    capacity: Int[Tensor, " d_sae"],
    center: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """Dense feature activations: the `capacity[i]` largest positive pre-activations of column i, ties to the earlier row."""
    pre_acts = (x if center is None else x - center) @ W_enc.T + b_enc
    order = pre_acts.sort(dim=0, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(x), device=x.device)[:, None].expand_as(order))
    return torch.where((rank < capacity) & (pre_acts > 0), pre_acts, 0)
