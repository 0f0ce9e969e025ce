"""Selection within rows of unequal length (CSR). On a CPU it uses numpy: several times faster than torch at this."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from saelab.kernels.torch_backend.halves import in_halves

_INT32 = np.iinfo(np.int32).max
_MAX_PADDING = 8  # a padded table may have this many times as many elements as there are entries


def kth_largest(values: Num[Tensor, "rows n"], k: int) -> Num[Tensor, " rows"]:
    """Each row's k-th largest value, by selection rather than sorting."""
    return largest(values, k)[:, 0].clone()


def largest(values: Num[Tensor, "rows n"], k: int) -> Num[Tensor, "rows k"]:
    """Each row's k largest values: the k-th largest first, the others in any order."""
    if values.device.type != "cpu":
        return values.topk(k, dim=1).values.flip(1)
    at, table = values.shape[1] - k, values.numpy()
    return torch.from_numpy(in_halves(len(table), lambda rows: np.partition(table[rows], at, axis=1)[:, at:]))


def flatnonzero(mask: Bool[Tensor, ...]) -> Int[Tensor, " n"]:
    """Flat positions of the true entries, ascending."""
    if mask.device.type != "cpu":
        return mask.reshape(-1).nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def sort(keys: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The keys in ascending order."""
    return torch.from_numpy(_sorted(keys.numpy()).astype(np.int64)) if keys.device.type == "cpu" else keys.sort().values


def stable_argsort(ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The permutation that sorts `ids`, stable for equal ids."""
    n = ids.numel()
    if ids.device.type != "cpu" or not n:
        return torch.argsort(ids, stable=True)
    place_bits = (n - 1).bit_length()
    largest = (int(ids.max()) + 1) << place_bits
    keys = ids.numpy().astype(np.int32 if largest <= _INT32 else np.int64) << place_bits
    keys |= np.arange(n, dtype=keys.dtype)
    return torch.from_numpy((_sorted(keys, largest) & ((1 << place_bits) - 1)).astype(np.int64))


def _sorted(keys: np.ndarray, largest: int | None = None) -> np.ndarray:
    """The keys sorted, as 32-bit integers if they fit: numpy sorts those several times faster."""
    largest = int(keys.max(initial=0)) if largest is None else largest
    return np.sort(keys.astype(np.int32 if largest <= _INT32 else np.int64, copy=False))


def count_before(positions: Int[Tensor, " n"], offsets: Int[Tensor, " rows_plus_1"]) -> Int[Tensor, " rows_plus_1"]:
    """Row offsets after only the entries at `positions` (ascending) are kept."""
    return torch.searchsorted(positions, offsets)


def keep_largest(
    scores: Float[Tensor, " nnz"], offsets: Int[Tensor, " rows_plus_1"], k: int | Int[Tensor, " rows"]
) -> tuple[Int[Tensor, " kept"], Float[Tensor, " rows"]]:
    """Positions (ascending) of each row's k largest positive scores, ties to the earliest, and the k-th largest score.

    k is one number, or one per row. A row with fewer than k positive scores keeps all of them, and its k-th score is 0.
    """
    counts = offsets.diff()
    rows = torch.repeat_interleave(counts, output_size=scores.numel())
    width = int(counts.max()) if counts.numel() else 0
    if isinstance(k, int) and k == 0:
        return counts.new_zeros(0), scores.new_full(counts.shape, torch.inf)
    if isinstance(k, int) and width < k:
        return flatnonzero(scores > 0), scores.new_zeros(counts.shape)
    if isinstance(k, Tensor) or counts.numel() * width > _MAX_PADDING * scores.numel() + (1 << 20):
        return _keep_by_sorting(scores, rows, k, counts.numel())
    mask = torch.arange(width, device=scores.device, dtype=torch.int32) < counts[:, None].int()
    table = scores.new_zeros(mask.shape).masked_scatter_(mask, scores)
    kth = kth_largest(table, k).clamp_min(0)
    kept = flatnonzero(scores >= kth.clamp_min(torch.finfo(scores.dtype).smallest_normal)[rows])
    if kept.numel() and int(torch.bincount(rows[kept]).max()) > k:  # ties at the k-th
        kept = kept[_rank(scores[kept], rows[kept]) < k]
    return kept, kth


def _keep_by_sorting(scores: Tensor, rows: Tensor, k: int | Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """`keep_largest` by sorting, for rows so uneven that a padded table would be mostly padding, and for one k per row."""
    each = k[rows] if isinstance(k, Tensor) else k
    rank = _rank(scores, rows)
    last = (rank == each - 1).nonzero().squeeze(1)
    kth = scores.new_zeros(n_rows).index_put((rows[last],), scores[last]).clamp_min(0)
    return flatnonzero((rank < each) & (scores > 0)), kth


def _rank(scores: Tensor, rows: Tensor) -> Tensor:
    """Rank of each entry in its row, 0 for the largest, ties by position; `rows` ascend."""
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    first = torch.searchsorted(rows, rows, right=False)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) - first[order]
    return rank
