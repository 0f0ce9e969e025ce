"""Candidates of a TopK selection in slots of fixed number: the pairs whose upper bound is near the k-th of their row.

The product of the operands (`prepare.py`) is an upper bound on every score, but for its own rounding to fp16 (`_STEP`). A
row's features form strided groups; the k-th largest group maximum is at most the k-th largest bound, and one margin below it
is the floor. A program takes one row: group maxima, their k-th largest by bisection over the 19 bits in which fp16 numbers
differ, then every feature that reaches the floor, in ascending order. A row with more of them than slots is noticed in
`select.py`.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.search import MARGIN
from saelab.kernels.triton_backend.launch import INTERPRETED, ceil_div, launch

_STEP = 2.0**-10
"""More than the relative error of rounding to fp16."""
_LEAST = 2.0**-24
"""More than the error of rounding a number below the normal range of fp16."""
_GROUPS = 1024
_LEAST_SLOTS = 16 if INTERPRETED else 128
_BLOCK = 2048


class Slots(NamedTuple):
    """Candidates of each row: the first `counts` slots of it, feature ids ascending; the others hold `d_sae`."""

    features: Int[Tensor, "batch slots"]
    counts: Int[Tensor, " batch"]
    """May exceed the number of slots: the others are then missing."""
    bounds: Float[Tensor, " batch"]
    """Every other pair of the row scores below this."""
    rough: Rough | None
    """Where rough values do (`dense.py`)."""


class Rough(NamedTuple):
    """Which candidates are certainly among the k largest, and need no exact value."""

    values: Float[Tensor, "batch slots"]
    """Theirs, to the accuracy of fp16; NaN for the others."""
    open_slots: Int[Tensor, "batch slots"]
    """The slots of the others, `n_open` a row."""
    n_open: Int[Tensor, " batch"]


@triton.jit
@no_type_check
def ordered(values):
    """Integers in the order of these fp32 numbers."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
@no_type_check
def twice_error(feature, inside, by_norm, by_error, norms_ptr, d_sae):
    """At least twice the bound that the columns of the operands have added to the scores of these features."""
    norm = tl.load(norms_ptr + feature, mask=inside, other=0.0)
    error = tl.load(norms_ptr + d_sae + feature, mask=inside, other=0.0)
    return 2.02 * (by_norm * norm + by_error * error) + 2.4e-7 * (by_norm + by_error + norm + error)


@triton.jit
@no_type_check
def _bounds_of(scores_ptr, feature, by_norm, by_error, norms_ptr, bias_ptr, d_sae):
    """Upper bounds on the scores of features: of their values, or with `bias` of their magnitudes."""
    inside = feature < d_sae
    u = tl.load(scores_ptr + feature, mask=inside, other=float("-inf")).to(tl.float32)
    if bias_ptr is not None:  # whose two halves were rounded up as well
        bias = tl.load(bias_ptr + feature, mask=inside, other=0.0)
        twice = twice_error(feature, inside, by_norm, by_error, norms_ptr, d_sae)
        twice += 2.0e-6 * tl.maximum(bias, -bias) + 2.0e-7
        u = tl.where(inside, tl.maximum(u, twice - u), float("-inf"))
    return u


@triton.jit
@no_type_check
def _group_maxima(scores_ptr, by_norm, by_error, norms_ptr, bias_ptr, d_sae, GROUPS: tl.constexpr):
    group = tl.arange(0, GROUPS)
    best = tl.full([GROUPS], float("-inf"), tl.float32)
    for first in range(0, d_sae, GROUPS):
        best = tl.maximum(best, _bounds_of(scores_ptr, first + group, by_norm, by_error, norms_ptr, bias_ptr, d_sae))
    return best


@triton.jit
@no_type_check
def _kth_largest(values, k):
    """The k-th largest of numbers that are exact in fp16 (or at most that): their ordered bits differ in the upper 19 only."""
    keys = ordered(values) >> 13
    low, high = (
        tl.full([], -(1 << 18), tl.int32),
        tl.full([], (1 << 18) - 1, tl.int32),
    )  # the k-th largest is in between
    for _ in range(19):
        middle = low + (high - low + 1) // 2
        enough = tl.sum((keys >= middle).to(tl.int32), axis=0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    bits = low << 13
    bits = tl.where(bits < 0, bits ^ 0x7FFFE000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _surely_kept(best, kth, k, by_norm, by_error, most_ptr, step, least):
    """A bound of `best`, one for each feature, above which a pair surely exceeds the (k+1)-th largest: it is kept."""
    below = tl.max(tl.where(best < kth, best, float("-inf")), axis=0)
    following = tl.where(tl.sum((best >= kth).to(tl.int32), axis=0) > k, kth, below)
    most, most_error = tl.load(most_ptr), tl.load(most_ptr + 1)
    error_bound = 2.02 * (by_norm * most + by_error * most_error) + 2.4e-7 * (by_norm + by_error + most + most_error)
    return tl.maximum(following + step * tl.maximum(following, -following), 0.0) + 2 * least + error_bound


@triton.jit
@no_type_check
def _store_rough(
    u,
    hit,
    slot,
    n_open,
    sure,
    feature,
    d_sae,
    by_norm,
    by_error,
    norms_ptr,
    rough_ptr,
    open_ptr,
    step,
    SLOTS: tl.constexpr,
):
    """Store the rough values of a block of candidates and list those without; returns their new number."""
    room = (hit > 0) & (slot < SLOTS)
    size = tl.load(norms_ptr + feature, mask=room, other=0.0)
    error = tl.load(norms_ptr + d_sae + feature, mask=room, other=0.0)
    is_sure = u - step * tl.maximum(u, -u) > sure
    rough = tl.where(is_sure, u - by_norm * size - by_error * error, float("nan"))
    tl.store(rough_ptr + slot, rough, mask=room)
    is_open = tl.where(is_sure | (slot >= SLOTS), 0, hit)
    at = n_open + tl.cumsum(is_open, axis=0) - 1
    tl.store(open_ptr + at, slot, mask=is_open > 0)
    return n_open + tl.sum(is_open, axis=0)


@triton.jit(do_not_specialize=["k", "first_row", "n_rows"])
@no_type_check
def _candidates_kernel(
    scores_ptr, by_norm_ptr, bias_ptr, norms_ptr, means_ptr, most_ptr, features_ptr, counts_ptr, bounds_ptr, rough_ptr, open_ptr,
    n_open_ptr, d_sae, k, first_row, n_rows, step, least,
    MARGIN: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + first_row
    scores_ptr += tl.program_id(0).to(tl.int64) * d_sae
    by_norm, by_error = tl.load(by_norm_ptr + row), tl.load(by_norm_ptr + n_rows + row)
    best = _group_maxima(scores_ptr, by_norm, by_error, norms_ptr, bias_ptr, d_sae, GROUPS)
    kth = _kth_largest(best, k)
    margin = by_norm * tl.load(means_ptr) + by_error * tl.load(means_ptr + 1)
    rounding = step * tl.maximum(kth, -kth) + least
    floor = tl.maximum(kth - 2 * rounding - MARGIN * margin, 0.0)
    if rough_ptr is not None:
        sure = _surely_kept(best, kth, k, by_norm, by_error, most_ptr, step, least)
    found, n_open = 0, 0
    for first in range(0, d_sae, BLOCK):
        feature = first + tl.arange(0, BLOCK)
        u = _bounds_of(scores_ptr, feature, by_norm, by_error, norms_ptr, bias_ptr, d_sae)
        hit = (u >= floor).to(tl.int32)
        slot = found + tl.cumsum(hit, axis=0) - 1
        tl.store(features_ptr + row * SLOTS + slot, feature, mask=(hit > 0) & (slot < SLOTS))
        if rough_ptr is not None:
            n_open = _store_rough(
                u, hit, slot, n_open, sure, feature, d_sae, by_norm, by_error, norms_ptr, rough_ptr + row * SLOTS,
                open_ptr + row * SLOTS, step, SLOTS,
            )  # fmt: skip
        found += tl.sum(hit, axis=0)
    for first in range(0, SLOTS, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        empty = (slot >= found) & (slot < SLOTS)
        tl.store(features_ptr + row * SLOTS + slot, tl.zeros([BLOCK], tl.int32) + d_sae, mask=empty)
    tl.store(counts_ptr + row, found)
    if rough_ptr is not None:
        tl.store(n_open_ptr + row, n_open)
    tl.store(bounds_ptr + row, tl.where(floor > 0.0, floor + step * floor + least, 0.0))  # what is below 0 stays so


@triton.jit(do_not_specialize=["d_sae"])
@no_type_check
def _sizes_kernel(norms_ptr, means_ptr, most_ptr, d_sae, BLOCK: tl.constexpr):
    kind = tl.program_id(0).to(tl.int64)
    total, most = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, d_sae, BLOCK):
        at = first + tl.arange(0, BLOCK)
        norms = tl.load(norms_ptr + kind * d_sae + at, mask=at < d_sae, other=0.0)
        total += norms
        most = tl.maximum(most, norms)
    tl.store(means_ptr + kind, tl.sum(total, axis=0) / d_sae)
    if most_ptr is not None:
        tl.store(most_ptr + kind, tl.max(most, axis=0))


def slots_for(k: int) -> int:
    """Slots of a row: several times what is needed on activations of real models (k plus 20 to 80)."""
    return max(_LEAST_SLOTS, 4 << (k - 1).bit_length())


def empty_slots(n_rows: int, k: int, device: torch.device, rough: bool = False) -> Slots:
    """Room for the candidates of `n_rows` rows."""
    features = torch.empty(n_rows, slots_for(k), dtype=torch.int32, device=device)
    counts = torch.empty(n_rows, dtype=torch.int32, device=device)
    values = torch.empty(features.shape, dtype=torch.float32, device=device) if rough else None
    open_slots = None if values is None else Rough(values, torch.empty_like(features), torch.empty_like(counts))
    return Slots(features, counts, torch.empty(n_rows, dtype=torch.float32, device=device), open_slots)


class Sizes(NamedTuple):
    """Norms of the features and of their rounding errors."""

    each: Float[Tensor, "2 d_sae"]
    means: Float[Tensor, " 2"]
    most: Float[Tensor, " 2"] | None
    """The largest; needed for `Slots.rough`."""


def sizes_of(norms: Float[Tensor, "2 d_sae"], with_most: bool) -> Sizes:
    """The sizes of features whose norms, and those of their rounding errors, are given."""
    means, most = norms.new_empty(2), norms.new_empty(2) if with_most else None
    launch(_sizes_kernel, (2,), norms, means, most, norms.shape[1], BLOCK=2 * _BLOCK, num_warps=8)
    return Sizes(norms, means, most)


def find_candidates(
    scores: Float[Tensor, "part d_sae"],
    bounds: Float[Tensor, "2 batch"],
    sizes: Sizes,
    k: int,
    first_row: int,
    out: Slots,
    bias: Float[Tensor, " d_sae"] | None = None,
) -> None:
    """Fill the slots of the rows from `first_row` on with the candidates of `scores`, in fp16; `bounds` are those of the rows
    (`prepare.Rows`). With the `bias` of the features magnitudes are compared."""
    d_sae = scores.shape[1]
    full = 1 << (max(d_sae, 2) - 1).bit_length()
    groups = full if out.rough is not None else min(max(_GROUPS, 32 << (k - 1).bit_length()), full)
    launch(
        _candidates_kernel, (scores.shape[0],),
        scores, bounds, bias, *sizes, *out[:3], *(out.rough or (None, None, None)),
        d_sae, k, first_row, bounds.shape[1], _STEP, _LEAST,
        MARGIN=MARGIN, SLOTS=out.features.shape[1], GROUPS=groups, BLOCK=min(_BLOCK, full),
        num_warps=4 if groups <= 2048 else 8,
    )  # fmt: skip


def slices_of(n_rows: int, d_sae: int, limit: int = 1 << 28) -> list[slice]:
    """Slices of the rows whose scores take at most `limit` numbers: the scores of a whole batch never exist at once."""
    step = max(1, limit // d_sae)
    step = ceil_div(n_rows, ceil_div(n_rows, step)) if n_rows else 1
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
