"""`weight_gradients`: `S.T @ g` for a sparse code S, the gradient of both weight matrices, one feature row at a time.

Walks the entries sorted by feature, so each gradient row is one sum in a fixed order: no atomics, same bits every run.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.bag_sum import bag_sum
from saelab.kernels.sparse_acts import SparseActs


def weight_gradients(
    acts: SparseActs, values: Float[Tensor, " nnz"], g: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_sae d_in"]:
    """`out[f] = sum over entries j of feature f of values[j] * g[row of j]`, on the pattern of `acts`."""
    order, rows, offsets = acts.by_feature
    return bag_sum(values[order], rows, offsets, g)


def bias_gradient(acts: SparseActs, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
    """`out[f] = sum of the values at feature f`, in the order of the rows."""
    out = values.new_zeros(acts.d_sae)
    if values.device.type == "cpu":
        return out.index_add_(0, acts.features, values)  # one thread, one order
    order, _, offsets = acts.by_feature
    return bag_sum(values[order], torch.zeros_like(order), offsets, values.new_ones(1, 1)).squeeze(1)
