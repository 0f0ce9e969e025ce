"""Reference of `encode_topk`: dense pre-activations, sort, ReLU. The specification, in plain PyTorch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def encode_topk(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"], k: int
) -> Float[Tensor, "batch d_sae"]:
    """The dense code `(batch, d_sae)`: ReLU of each row's k largest pre-activations, ties to the lowest id."""
    pre_acts = x @ W_enc.T + b_enc
    kept = pre_acts.sort(dim=1, descending=True, stable=True).indices[:, :k]
    mask = torch.zeros_like(pre_acts, dtype=torch.bool).scatter(1, kept, True)
    return torch.where(mask, pre_acts, 0).relu()
