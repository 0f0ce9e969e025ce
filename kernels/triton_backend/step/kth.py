"""The n-th largest of the scores of a whole batch, without sorting: two histograms, of the upper and the lower bits.

Positive fp32 numbers are in the order of their bits. One program walks the bins from the top. `count_floors` counts lower
bounds of a batch's scores, the largest of each group of a row: their n-th largest is at most the n-th largest score, so that
every pair which is to be kept reaches it. Counts are integers: no order of the programs shows.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.launch import ceil_div, launch
from saelab.kernels.triton_backend.step.candidates import _GROUPS, _LEAST, _STEP, twice_error

LOW_BITS = 15
BINS = 1 << 16
_BLOCK = 4096
_PAIRS = 1024
_WARPS = 4


@triton.jit(do_not_specialize=["first_row", "n_rows"])
@no_type_check
def _count_floors_kernel(
    scores_ptr, bounds_ptr, norms_ptr, bias_ptr, bins_ptr, d_sae, first_row, n_rows, step, least,
    LOW_BITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + first_row
    scores_ptr += tl.program_id(0).to(tl.int64) * d_sae
    by_norm, by_error = tl.load(bounds_ptr + row), tl.load(bounds_ptr + n_rows + row)
    best = tl.zeros([GROUPS], tl.float32)
    for first in range(0, d_sae, GROUPS):
        feature = first + tl.arange(0, GROUPS)
        inside = feature < d_sae
        u = tl.load(scores_ptr + feature, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + feature, mask=inside, other=0.0)
        twice = twice_error(feature, inside, by_norm, by_error, norms_ptr, d_sae)
        twice += 2.0e-6 * tl.maximum(bias, -bias) + 2.0e-7  # its two halves were rounded up as well
        lower = u - step * tl.maximum(u, -u) - least - twice
        best = tl.maximum(best, tl.where(lower < float("inf"), lower, 0.0))
    tl.atomic_add(bins_ptr + (best.to(tl.int32, bitcast=True) >> LOW_BITS), 1, mask=best > 0)


@triton.jit(do_not_specialize=["n_wanted"])
@no_type_check
def _nth_kernel(
    bins_ptr, found_ptr, n_wanted, LOW: tl.constexpr, LOW_BITS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the bin of the n-th largest number, 0 if there are fewer, and how many of it are among the n; empty the bins."""
    if LOW:
        n_wanted = tl.load(found_ptr + 1)
    above, found, needed = 0, -1, 0
    for block in range(0, BINS // BLOCK):
        at = BINS - (block + 1) * BLOCK + tl.arange(0, BLOCK)
        n = tl.load(bins_ptr + at)
        tl.store(bins_ptr + at, tl.zeros([BLOCK], tl.int32))
        in_block = tl.sum(n, axis=0)
        reached = above + in_block - tl.cumsum(n, axis=0) + n  # numbers in this bin or above
        here = tl.max(tl.where(reached >= n_wanted, at, -1), axis=0)
        reaches = (found < 0) & (here >= 0)
        larger = above + tl.sum(tl.where(at > here, n, 0), axis=0)
        needed = tl.where(reaches, n_wanted - larger, needed)
        found = tl.where(reaches, here, found)
        above += in_block
    needed = tl.where(found < 0, n_wanted - above, needed)
    found = tl.maximum(found, 0)
    if LOW:
        found = (tl.load(found_ptr) << LOW_BITS) | found
    tl.store(found_ptr, found)
    tl.store(found_ptr + 1, needed)


@triton.jit(do_not_specialize=["n_pairs", "n_tiles", "d_sae"])
@no_type_check
def _count_scores_kernel(
    values_ptr, partials_ptr, features_ptr, bias_ptr, found_ptr, bins_ptr, n_pairs, n_tiles, d_sae,
    LOW: tl.constexpr, LOW_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < n_pairs
    if LOW:
        value = tl.load(values_ptr + pair, mask=inside, other=0.0)
        bits = value.to(tl.int32, bitcast=True)
        counted = (value > 0) & ((bits >> LOW_BITS) == tl.load(found_ptr))
        tl.atomic_add(bins_ptr + (bits & ((1 << LOW_BITS) - 1)), 1, mask=counted)
    else:
        feature = tl.load(features_ptr + pair, mask=inside, other=d_sae)
        real = feature < d_sae
        value = tl.zeros([BLOCK], tl.float32)
        for _ in range(0, n_tiles):
            value += tl.load(partials_ptr + pair, mask=real, other=0.0)
            partials_ptr += n_pairs
        value += tl.load(bias_ptr + feature, mask=real, other=0.0)
        tl.store(values_ptr + pair, value, mask=inside)
        if bins_ptr is not None:
            bits = value.to(tl.int32, bitcast=True)
            tl.atomic_add(bins_ptr + (bits >> LOW_BITS), 1, mask=value > 0)


def count_floors(
    scores: Float[Tensor, "part d_sae"],
    bounds: Tensor,
    norms: Tensor,
    bias: Tensor,
    first_row: int,
    k: int,
    bins: Tensor,
) -> None:
    """Count the lower bounds of the rows from `first_row` on; `bounds` and `norms` are those of `prepare.py`."""
    d_sae = scores.shape[1]
    groups = min(max(_GROUPS, 32 << (k - 1).bit_length()), 1 << (max(d_sae, 2) - 1).bit_length())
    operands = (scores, bounds, norms, bias, bins, d_sae, first_row, bounds.shape[1], _STEP, _LEAST)
    launch(_count_floors_kernel, (scores.shape[0],), *operands, LOW_BITS=LOW_BITS, GROUPS=groups, num_warps=_WARPS)


def values_of(
    partials: Float[Tensor, "tiles room"],
    features: Tensor,
    bias: Tensor,
    d_sae: int,
    values: Tensor,
    bins: Tensor | None,
) -> None:
    """Sum up `values` from their parts, and count their upper bits in `bins`."""
    n_tiles, n_pairs = partials.shape
    operands = (values, partials, features, bias, None, bins, n_pairs, n_tiles, d_sae)
    _launch_counts(*operands, LOW=False)


def nth_largest(values: Float[Tensor, " room"], n: int, found: Int[Tensor, " 2"], bins: Tensor) -> None:
    """Bits of the n-th largest of the positive `values`, counted by `values_of`, 0 if there are fewer; and how many equal to it
    are among the n."""
    nth_bin(bins, found, n)
    _launch_counts(values, None, None, None, found, bins, values.numel(), 0, 0, LOW=True)
    nth_bin(bins, found, None)


def nth_bin(bins: Tensor, found: Int[Tensor, " 2"], n: int | None) -> None:
    """The bin of the n-th largest number counted (None: as many as were still needed); afterwards the bins are empty."""
    sizes = {"LOW_BITS": LOW_BITS, "BINS": BINS, "BLOCK": _BLOCK}
    launch(_nth_kernel, (1,), bins, found, n or 0, LOW=n is None, **sizes, num_warps=8)


def empty_bins(device: torch.device) -> Int[Tensor, " bins"]:
    return torch.zeros(BINS, dtype=torch.int32, device=device)


def _launch_counts(values: Tensor, *operands: Tensor | int | None, LOW: bool) -> None:
    grid = (ceil_div(values.numel(), _PAIRS),)
    launch(_count_scores_kernel, grid, values, *operands, LOW=LOW, LOW_BITS=LOW_BITS, BLOCK=_PAIRS, num_warps=_WARPS)
