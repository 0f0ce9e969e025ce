"""Reference implementation of `encode_threshold`: dense pre-activations, kept where above the threshold."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def encode_threshold(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: float | Float[Tensor, ""] | Float[Tensor, " d_sae"] = 0.0,
    band: float = 0.0,
    center: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """Dense feature activations: the pre-activation `u` where `u > threshold - band`, else 0."""
    pre_acts = (x if center is None else x - center) @ W_enc.T + b_enc
    return torch.where(pre_acts > threshold - band, pre_acts, 0)
