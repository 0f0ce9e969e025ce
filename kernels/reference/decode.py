"""Reference implementation of `decode`: a dense product."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs


def decode(
    feature_acts: SparseActs,
    W_dec: Float[Tensor, "d_sae *sources d_in"],
    b_dec: Float[Tensor, "*sources d_in"] | None = None,
) -> Float[Tensor, "batch *sources d_in"]:
    """`x_hat = feature_acts @ W_dec + b_dec`."""
    x_hat = (feature_acts.to_dense() @ W_dec.flatten(1)).unflatten(1, W_dec.shape[1:])
    return x_hat if b_dec is None else x_hat + b_dec
