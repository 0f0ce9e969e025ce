"""`sddmm` (gather-dot) in PyTorch: the gradient of `embedding_bag` with respect to its per-sample weights."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from saelab.kernels.ragged import stable_argsort

_MANY = 4096
_CACHE_BYTES = 1 << 21


def sddmm(x: Tensor, W: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
    """`values[j] = <x[row of j], W[features[j]]>`.

    If there are many pairs and `W` has more rows than `x`, they are processed by feature, so that the gathered rows are
    those of the smaller matrix. `x` is cut into parts that fit a core's cache, and each row of `W` is read once per part.
    A pair's bits are the same either way. Raises `IndexError` for an id out of range or offsets that do not fit.
    """
    n = features.numel()
    if n == 0:
        return x.new_zeros(0)
    lowest, highest = features.aminmax()
    if int(lowest) < 0 or int(highest) >= W.shape[0] or int(offsets[-1]) != n:
        raise IndexError(
            f"Feature ids range from {int(lowest)} to {int(highest)}, but W has {len(W)} rows; features has {n} entries, "
            f"offsets end at {int(offsets[-1])}."
        )
    rows = torch.repeat_interleave(offsets.diff(), output_size=n)
    if n < _MANY or W.shape[0] <= x.shape[0]:
        return pairs(x, W, rows, features)
    n_slices = min(-(-x.numel() * x.element_size() // _CACHE_BYTES), n // (2 * W.shape[0]))
    slice_rows = -(-x.shape[0] // max(n_slices, 1))
    edges = [
        *offsets[:-1:slice_rows].tolist(),
        n,
    ]  # entries ascend by row, so a part of the rows is a contiguous run of entries
    order = torch.cat([start + stable_argsort(features[start:end]) for start, end in pairwise(edges)])
    by_feature = pairs(W, x, features.int()[order], rows.int()[order])
    return torch.empty_like(by_feature).index_copy_(0, order, by_feature)


def pairs(x: Tensor, W: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`<x[rows[j]], W[columns[j]]>` for ids in range: in torch, the gradient of a bag's per-sample weights."""
    rows, columns = rows.int(), columns.int()
    offsets = rows.new_zeros(1)  # not read: `rows` says which bag
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(x, W, columns, offsets, rows, 0, -1)
