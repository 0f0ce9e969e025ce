"""Which candidates of a list are kept: the n largest of the batch, or those above the threshold of their feature.

Two passes, each with a program for every row: the first counts, the second writes the kept pairs where the running totals say,
row by row and features ascending. Of pairs that tie at the n-th place the earlier rows and the lower features are kept. If the
list had no room for all candidates, `void` becomes NaN, and stays so: no weight may change until the caller has made room.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.launch import launch
from saelab.kernels.triton_backend.step.pair_list import PairList

_BLOCK = 256
_WARPS = 2


class Kept(NamedTuple):
    """The kept pairs, row by row, in a list of fixed length."""

    values: Float[Tensor, " room"]
    """Infinite where there is no pair."""
    features: Int[Tensor, " room"]
    """`d_sae` where there is no pair: behind all others."""
    rows: Int[Tensor, " room"]
    offsets: Int[Tensor, " batch_plus_1"]
    counts: Int[Tensor, "2 batch"]
    """Of each row the pairs that are surely kept, and those that tie at the last place."""


@triton.jit
@no_type_check
def _block_of(row, first, begins_ptr, counts_ptr, features_ptr, values_ptr, room, BLOCK: tl.constexpr):
    """A block of a row's candidates: which are real, their features and their values."""
    slot = first + tl.arange(0, BLOCK)
    at = tl.load(begins_ptr + row) + slot
    real = (slot < tl.load(counts_ptr + row)) & (at < room)
    return real, tl.load(features_ptr + at, mask=real, other=0), tl.load(values_ptr + at, mask=real, other=0.0)


@triton.jit
@no_type_check
def _verdict(real, feature, value, last_ptr, floors_ptr):
    """Whether pairs are surely kept, and whether they tie at the last place."""
    if last_ptr is not None:
        bits, last = value.to(tl.int32, bitcast=True), tl.load(last_ptr)
        positive = real & (value > 0)
        return positive & (bits > last), positive & (bits == last)
    floor = 0.0
    if floors_ptr is not None:
        floor = tl.load(floors_ptr + feature, mask=real, other=0.0)
    return real & (value > floor) & (value != 0), real & (feature < 0)


@triton.jit(do_not_specialize=["n_rows", "room"])
@no_type_check
def _count_kept_kernel(
    features_ptr, begins_ptr, counts_ptr, total_ptr, values_ptr, last_ptr, floors_ptr, kept_counts_ptr, void_ptr, n_rows, room,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    n_sure, n_tied = 0, 0
    for first in range(0, tl.load(counts_ptr + row), BLOCK):
        real, feature, value = _block_of(row, first, begins_ptr, counts_ptr, features_ptr, values_ptr, room, BLOCK)
        sure, tied = _verdict(real, feature, value, last_ptr, floors_ptr)
        n_sure += tl.sum(sure.to(tl.int32), axis=0)
        n_tied += tl.sum(tied.to(tl.int32), axis=0)
    tl.store(kept_counts_ptr + row, n_sure)
    tl.store(kept_counts_ptr + n_rows + row, n_tied)
    if (row == 0) & (tl.load(total_ptr) > room):
        tl.store(void_ptr, float("nan"))


@triton.jit(do_not_specialize=["n_rows", "room"])
@no_type_check
def _write_kept_kernel(
    features_ptr, begins_ptr, counts_ptr, values_ptr, last_ptr, floors_ptr, kept_counts_ptr, totals_ptr, kept_values_ptr,
    kept_features_ptr, kept_rows_ptr, offsets_ptr, n_rows, room, kept_room, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    n_sure, n_tied = tl.load(kept_counts_ptr + row), tl.load(kept_counts_ptr + n_rows + row)
    sure_before = tl.load(totals_ptr + row) - n_sure
    tied_before = tl.load(totals_ptr + n_rows + row) - n_tied
    needed = tied_before
    if last_ptr is not None:
        needed = tl.maximum(tl.load(last_ptr + 1).to(tl.int64), 0)
    place = sure_before + tl.minimum(tied_before, needed)
    left = tl.maximum(needed - tied_before, 0)  # of the ties, for this row and later ones
    tl.store(offsets_ptr + row + 1, place + n_sure + tl.minimum(n_tied, left))
    for first in range(0, tl.load(counts_ptr + row), BLOCK):
        real, feature, value = _block_of(row, first, begins_ptr, counts_ptr, features_ptr, values_ptr, room, BLOCK)
        sure, tied = _verdict(real, feature, value, last_ptr, floors_ptr)
        kept = (sure | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= left))).to(tl.int32)
        at = place + tl.cumsum(kept, axis=0) - 1
        fits = (kept > 0) & (at < kept_room)
        tl.store(kept_values_ptr + at, value, mask=fits)
        tl.store(kept_features_ptr + at, feature, mask=fits)
        tl.store(kept_rows_ptr + at, tl.zeros([BLOCK], tl.int32) + row, mask=fits)
        place += tl.sum(kept, axis=0)
        left -= tl.minimum(left, tl.sum(tied.to(tl.int32), axis=0))


def keep(
    found: PairList,
    last: Int[Tensor, " 2"] | None,
    floors: Float[Tensor, " d_sae"] | None,
    d_sae: int,
    void: Tensor,
    out: Kept,
) -> None:
    """Fill `out`: with the pairs from the `last` on (`kth.nth_largest`); or where that is None, with the values above `floors`,
    or above 0, that are not 0."""
    n_rows, room = out.counts.shape[1], found.features.numel()
    lists = (found.features, found.begins, found.counts)
    operands = (*lists, found.total, found.values, last, floors, out.counts, void, n_rows, room)
    launch(_count_kept_kernel, (n_rows,), *operands, BLOCK=_BLOCK, num_warps=_WARPS)
    totals = out.counts.cumsum(1)
    out.values.fill_(torch.inf)
    out.features.fill_(d_sae)
    operands = (*lists, found.values, last, floors, out.counts, totals, *out[:4], n_rows, room, out.values.numel())
    launch(_write_kept_kernel, (n_rows,), *operands, BLOCK=_BLOCK, num_warps=_WARPS)


def empty_kept(n_rows: int, room: int, device: torch.device) -> Kept:
    """Room for the kept pairs of `n_rows` rows."""
    ints = torch.zeros(2, room, dtype=torch.int32, device=device)
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=device)
    counts = torch.zeros(2, n_rows, dtype=torch.int32, device=device)
    return Kept(torch.zeros(room, dtype=torch.float32, device=device), ints[0], ints[1], offsets, counts)
