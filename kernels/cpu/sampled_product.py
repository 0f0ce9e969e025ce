"""The gather-dot in PyTorch: `torch.sparse.sampled_addmm`, which computes pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.kernels.ragged import stable_order
from saelab.kernels.sparse_acts import csr_tensor, offsets_of

_MANY = 4096


def sampled_product(x: Tensor, W: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
    """`values[j] = <x[row of j], W[features[j]]>`.

    Many pairs of a `W` larger than `x` are walked by feature: each row of `W` is then read once, and the rows gathered
    are those of the smaller matrix. A pair has the same bits either way.
    """
    if features.numel() == 0:
        return x.new_zeros(0)
    if features.numel() < _MANY or W.shape[0] <= x.shape[0]:
        return _pairs(x, W, features, offsets)
    order = stable_order(features)
    rows = torch.repeat_interleave(offsets.diff(), output_size=features.numel())[order]
    by_feature = _pairs(W, x, rows, offsets_of(torch.bincount(features, minlength=W.shape[0])))
    return torch.empty_like(by_feature).index_copy_(0, order, by_feature)


def _pairs(x: Tensor, W: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    pattern = csr_tensor(x.new_zeros(columns.numel()), columns, offsets, W.shape[0])
    return torch.sparse.sampled_addmm(pattern, x, W.T, beta=0.0).values()
