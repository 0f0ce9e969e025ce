"""Reference implementation of `spmm_transposed`: a dense transposed product."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def spmm_transposed(
    feature_values: Float[Tensor, "batch d_sae"], g: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_sae d_in"]:
    """`feature_values.T @ g`."""
    return feature_values.T @ g
