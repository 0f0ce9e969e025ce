"""`weight_gradients`: `S.T @ g` for a sparse code S, the gradient of both weight matrices, one feature row at a time.

Walks the entries sorted by feature, so each gradient row is one sum in a fixed order: no atomics, same bits every run.
The sorted order is made once a step (`SparseActs.by_feature`) and serves both matrices.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.dispatch import backend
from saelab.kernels.sparse_acts import SparseActs


@torch.no_grad()
def weight_gradients(
    acts: SparseActs, values: Float[Tensor, " nnz"], g: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_sae d_in"]:
    """`out[f] = sum over entries j of feature f of values[j] * g[row of j]`, on the pattern of `acts`."""
    return backend(g).weight_gradients(acts, values.detach(), g.detach())


@torch.no_grad()
def bias_gradient(acts: SparseActs, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
    """`out[f] = sum of the values at feature f`, in the order of the rows."""
    return backend(values).bias_gradient(acts, values.detach())
