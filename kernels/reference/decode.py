"""Reference implementation of `decode`: a dense product."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def decode(
    feature_acts: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "batch d_in"]:
    """`x_hat = feature_acts @ W_dec + b_dec`."""
    x_hat = feature_acts @ W_dec
    return x_hat if b_dec is None else x_hat + b_dec
