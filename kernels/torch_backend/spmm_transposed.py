"""`spmm_transposed` in PyTorch: the weight gradients as `embedding_bag` sums over the entries of each feature."""

from __future__ import annotations

from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs
from saelab.kernels.torch_backend.spmm import spmm


def spmm_transposed(feature_acts: SparseActs, values: Tensor, g: Tensor) -> Tensor:
    """`out[f] = sum over entries j of feature f of values[j] * g[row of j]`."""
    order, rows, offsets = feature_acts.by_feature
    return spmm(values[order], rows, offsets, g)


def bias_gradient(feature_acts: SparseActs, values: Tensor) -> Tensor:
    """`out[f] = sum of the values at feature f`."""
    if values.device.type == "cpu":
        return values.new_zeros(feature_acts.d_sae).index_add_(
            0, feature_acts.features, values
        )  # single-threaded, so the order is fixed
    order, _, offsets = feature_acts.by_feature
    return spmm(values[order], order.new_zeros(order.numel()), offsets, values.new_ones(1, 1)).squeeze(1)
