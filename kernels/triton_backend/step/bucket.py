"""The dead features of a step, listed on the device into a bucket of fixed capacity; and which of them AuxK keeps.

Nobody but the device knows how many there are. Each program that works on the bucket reads their number and ends at once where
there is nothing to do, so that time is spent on dead features only, and no result depends on the capacity.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.launch import ceil_div, launch

_LEAST = 512
"""The smallest capacity."""
_ALIGNED = 16
"""Capacities are multiples of this. Triton may sum in another order if a stride is not aligned as the others are."""
_LISTED, _LISTED_WARPS = 4096, 8
_BLOCK, _WARPS = 1024, 4


class Bucket(NamedTuple):
    """The first `count` entries of a row or list are those of the dead features; the others are undefined."""

    ids: Int[Tensor, " capacity"]
    """Ascending."""
    count: Int[Tensor, " 1"]
    feature_acts: Float[Tensor, "rows capacity"]
    dacts: Float[Tensor, "rows capacity"]
    """Gradients of `feature_acts`."""


@triton.jit(do_not_specialize=["window", "d_sae", "capacity"])
@no_type_check
def _list_kernel(since_ptr, ids_ptr, count_ptr, window, d_sae, capacity, BLOCK: tl.constexpr):
    """A program counts the dead features before its own, and lists these."""
    first = tl.program_id(0) * BLOCK
    at = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for earlier in range(0, first, BLOCK):
        before += (tl.load(since_ptr + earlier + at) >= window).to(tl.int32)
    feature = first + at
    since = tl.load(since_ptr + feature, mask=feature < d_sae, other=0)
    dead = ((feature < d_sae) & (since >= window)).to(tl.int32)
    n_before = tl.sum(before, axis=0)
    slot = n_before + tl.cumsum(dead, axis=0) - 1
    tl.store(ids_ptr + slot, feature, mask=(dead > 0) & (slot < capacity))
    n_dead = tl.minimum(n_before + tl.sum(dead, axis=0), capacity)  # more would be noticed in `dead_bound.py`
    tl.store(count_ptr, n_dead, mask=first + BLOCK >= d_sae)


@triton.jit
@no_type_check
def _keys(values):
    """Integers in the order of these numbers, none of which is negative; NaN comes last, as in `torch.topk`."""
    return tl.minimum(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)


@triton.jit
@no_type_check
def _number_from(row_ptr, count, key, BLOCK: tl.constexpr):
    """How many of the first `count` numbers have at least this key."""
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        values = tl.load(row_ptr + slot, mask=slot < count, other=0.0)
        found += ((slot < count) & (_keys(values) >= key)).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit(do_not_specialize=["k"])
@no_type_check
def _keep_largest_kernel(feature_acts_ptr, count_ptr, k, capacity, BLOCK: tl.constexpr):
    """Find the k-th largest key of a row by bisection, and set to 0 what is below it, or equal to it but beyond the k-th."""
    row_ptr = feature_acts_ptr + tl.program_id(0).to(tl.int64) * capacity
    count = tl.load(count_ptr)
    if _number_from(row_ptr, count, 1, BLOCK) <= k:
        return
    low, high = tl.full([], 1, tl.int32), tl.full([], 0x7F800001, tl.int32)  # the k-th largest key is in between
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        enough = _number_from(row_ptr, count, middle, BLOCK) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    left = k - _number_from(
        row_ptr, count, low + 1, BLOCK
    )  # of those with the k-th largest key, the first so many are kept
    for first in range(0, count, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        values = tl.load(row_ptr + slot, mask=slot < count, other=0.0)
        keys = _keys(values)
        equal = (keys == low).to(tl.int32)
        kept = (keys > low) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= left))
        tl.store(row_ptr + slot, tl.where(kept, values, 0.0), mask=slot < count)
        left -= tl.sum(equal, axis=0)


def capacity_for(n_dead: int, d_sae: int) -> int:
    """The capacity of a bucket for `n_dead` features: a power of two, or all of `d_sae` and what alignment adds."""
    full = ceil_div(d_sae, _ALIGNED) * _ALIGNED
    return min(max(_LEAST, 1 << (n_dead - 1).bit_length()), full)


def empty_bucket(capacity: int, n_rows: int, device: torch.device) -> Bucket:
    """Room for the dead features, and for the activations of `n_rows` rows at a time."""
    ids = torch.empty(capacity, dtype=torch.int32, device=device)
    both = torch.empty(2, n_rows, capacity, dtype=torch.float32, device=device)
    return Bucket(ids, torch.zeros(1, dtype=torch.int32, device=device), both[0], both[1])


def list_dead(since: Int[Tensor, " d_sae"], window: int, out: Bucket) -> None:
    """Fill ids and count of `out` with the features whose counter is at `window` or beyond."""
    (d_sae,), (capacity,) = since.shape, out.ids.shape
    operands = (since, out.ids, out.count, window, d_sae, capacity)
    launch(_list_kernel, (ceil_div(d_sae, _LISTED),), *operands, BLOCK=_LISTED, num_warps=_LISTED_WARPS)


def keep_largest(feature_acts: Float[Tensor, "rows capacity"], count: Int[Tensor, " 1"], k: int) -> None:
    """Set all but the k largest of the first `count` entries of each row to 0; of equal ones the first are kept."""
    n_rows, capacity = feature_acts.shape
    if capacity > k:
        launch(_keep_largest_kernel, (n_rows,), feature_acts, count, k, capacity, BLOCK=_BLOCK, num_warps=_WARPS)
