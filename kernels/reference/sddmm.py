"""Reference implementation of `sddmm`: gather, multiply, sum."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def sddmm(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    rows: Int[Tensor, " nnz"],
    features: Int[Tensor, " nnz"],
) -> Float[Tensor, " nnz"]:
    """`values[j] = <x[rows[j]], W[features[j]]>`."""
    return (x[rows] * W[features]).sum(1)
