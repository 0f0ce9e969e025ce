"""`weight_gradients`: `S.T @ g` for a sparse code S, the gradient of both weight matrices, one feature row at a time.

Walks the entries sorted by feature, so each gradient row is one sum in a fixed order: no atomics, same bits every run.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs


def weight_gradients(
    acts: SparseActs, values: Float[Tensor, " nnz"], g: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_sae d_in"]:
    """`out[f] = sum over entries j of feature f of values[j] * g[row of j]`, on the pattern of `acts`."""
    order, rows, offsets = acts.by_feature
    return F.embedding_bag(rows, g, offsets[:-1], mode="sum", per_sample_weights=values[order])


def bias_gradient(acts: SparseActs, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
    """`out[f] = sum of the values at feature f`, summed in the same fixed order."""
    order, _, offsets = acts.by_feature
    ones = values.new_ones(1, 1)
    zeros = order.new_zeros(order.numel())
    return F.embedding_bag(zeros, ones, offsets[:-1], mode="sum", per_sample_weights=values[order]).squeeze(1)
