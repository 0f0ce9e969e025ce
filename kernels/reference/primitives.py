"""Reference implementation of the primitives of a `Backend`: dense products with the same signatures. There is no screen,
as the reference encoders evaluate every pair."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs


class Screen:
    """Not available: a dense encoder needs no candidates."""

    def __init__(self, *args: object) -> None:
        raise AssertionError("the reference encoders do not screen")


def rows_at_once(n_columns: int, dtype: torch.dtype) -> int:
    """Not available, like `Screen`."""
    raise AssertionError("the reference encoders do not screen")


def sddmm(x: Tensor, W: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
    """`<x[row], W[feature]>` at the pairs."""
    return (x[torch.repeat_interleave(offsets.diff())] * W[features]).sum(1)


def spmm(values: Tensor, features: Tensor, offsets: Tensor, W: Tensor) -> Tensor:
    """A dense matrix of the values, times W."""
    dense = values.new_zeros(len(offsets) - 1, len(W))
    dense.index_put_((torch.repeat_interleave(offsets.diff()), features), values, accumulate=True)
    return dense @ W


def spmm_residual(
    values: Tensor, features: Tensor, offsets: Tensor, W: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor]:
    """`spmm + bias - target`, and its squared norm."""
    error = spmm(values, features, offsets, W) - target + (0 if bias is None else bias)
    return error, error.square().sum()


def spmm_transposed(feature_acts: SparseActs, values: Tensor, g: Tensor) -> Tensor:
    """`S.T @ g`."""
    return feature_acts.with_values(values).to_dense().T @ g


def bias_gradient(feature_acts: SparseActs, values: Tensor) -> Tensor:
    """The sum of each column."""
    return feature_acts.with_values(values).to_dense().sum(0)


def round_rows(W: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Write W, rounded, into `low`; returns the norms of each row and of its rounding error."""
    rounded = low[:, : W.shape[1]].copy_(W)
    return W.norm(dim=1), (rounded.to(W) - W).norm(dim=1)


def project_(gradient: Tensor, W: Tensor) -> None:
    """Remove from each row of the gradient its component along the row of W."""
    gradient -= (gradient * W).sum(1, keepdim=True) * W


def unit_norm_(W: Tensor) -> None:
    """Scale each row to norm 1; a row of zeros stays zero."""
    W /= W.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).eps)
