"""Least squares for the few features that a pursuit has chosen for each token, all tokens at once.

A token's coefficients are independent of the rest of its batch, bit for bit; so the small systems are solved by elementwise
operations, not by a batched LAPACK.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.precision import widened
from saelab.kernels.primitives import sddmm
from saelab.kernels.sparse_acts import SparseActs

RIDGE = 16
"""Added to the diagonal of the normal equations, in units of the dtype's epsilon: two equal features share a coefficient."""


@torch.no_grad()
def least_squares(chosen: SparseActs, W: Float[Tensor, "d_sae d_in"]) -> SparseActs:
    """The coefficients with which the chosen rows of `W` are nearest to r, where `chosen` holds <r, d_i>."""
    (W,) = widened(W)
    pairs = chosen.select_rows(chosen.rows)  # for each entry all entries of its token
    slots = _slots(chosen)
    width = int(chosen.counts.max()) if chosen.batch else 0
    gram = torch.eye(width, dtype=W.dtype, device=W.device).repeat(chosen.batch, 1, 1)
    products = sddmm(W[chosen.features], W, pairs.features, pairs.offsets)
    gram[chosen.rows[pairs.rows], slots[pairs.rows], _slots(pairs)] = products
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE * torch.finfo(W.dtype).eps)
    right = gram.new_zeros(chosen.batch, width)
    right[chosen.rows, slots] = chosen.values
    return chosen.with_values(cholesky_solve(gram, right)[chosen.rows, slots])


def _slots(chosen: SparseActs) -> Tensor:
    """The position of each entry within its row."""
    return torch.arange(chosen.nnz, device=chosen.features.device) - chosen.offsets[:-1][chosen.rows]


def cholesky_solve(A: Float[Tensor, "n m m"], b: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """The solutions of `A y = b` for positive definite matrices of a few rows, by Cholesky decomposition."""
    A, b = A.clone(), b.clone()
    for j in range(A.shape[1]):
        A[:, j, j] = A[:, j, j].clamp_min(torch.finfo(A.dtype).eps).sqrt()
        A[:, j + 1 :, j] /= A[:, j, j, None]
        b[:, j] /= A[:, j, j]
        A[:, j + 1 :, j + 1 :] -= A[:, j + 1 :, j, None] * A[:, None, j + 1 :, j]
        b[:, j + 1 :] -= A[:, j + 1 :, j] * b[:, j, None]
    for j in reversed(range(A.shape[1])):
        b[:, j] /= A[:, j, j]
        b[:, :j] -= A[:, j, :j] * b[:, j, None]
    return b
