"""Candidates of a whole batch in one list, for selections in which a row may keep any number of pairs.

The list has room for a fixed number of pairs, which the caller chooses; the number of those found may exceed it, and then the
step is void (`keep.py`). A row's pairs lie together, features ascending; the order of the rows in the list is that of their
programs, on which nothing depends. Every pair whose upper bound reaches the floor is in it: none has to be looked for again.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.launch import launch
from saelab.kernels.triton_backend.step.candidates import _LEAST, _STEP
from saelab.kernels.triton_backend.step.kth import LOW_BITS

_BLOCK = 2048
_WARPS = 4


class PairList(NamedTuple):
    """The candidates of a batch."""

    features: Int[Tensor, " room"]
    """`d_sae` where there is no pair: behind all others."""
    rows: Int[Tensor, " room"]
    begins: Int[Tensor, " batch"]
    counts: Int[Tensor, " batch"]
    total: Int[Tensor, " 1"]
    """Number of candidates, which may exceed the room; to be set to 0 before the next step."""
    values: Float[Tensor, " room"]
    """Theirs, exact."""


@triton.jit(do_not_specialize=["first_row", "room"])
@no_type_check
def _collect_kernel(
    scores_ptr, floor_ptr, features_ptr, rows_ptr, begins_ptr, counts_ptr, total_ptr, d_sae, first_row, room, step, least,
    LOW_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + first_row
    scores_ptr += tl.program_id(0).to(tl.int64) * d_sae
    floor = 0.0
    if floor_ptr is not None:
        floor = (tl.load(floor_ptr) << LOW_BITS).to(tl.float32, bitcast=True)
    count = 0
    for first in range(0, d_sae, BLOCK):
        feature = first + tl.arange(0, BLOCK)
        u = tl.load(scores_ptr + feature, mask=feature < d_sae, other=float("-inf")).to(tl.float32)
        u += step * tl.maximum(u, -u) + least
        count += tl.sum(((u >= floor) & (u > 0)).to(tl.int32), axis=0)
    begin = tl.atomic_add(total_ptr, count)
    tl.store(begins_ptr + row, begin)
    tl.store(counts_ptr + row, count)
    for first in range(0, d_sae, BLOCK):
        feature = first + tl.arange(0, BLOCK)
        u = tl.load(scores_ptr + feature, mask=feature < d_sae, other=float("-inf")).to(tl.float32)
        u += step * tl.maximum(u, -u) + least
        hit = ((u >= floor) & (u > 0)).to(tl.int32)
        at = begin + tl.cumsum(hit, axis=0) - 1
        fits = (hit > 0) & (at < room)
        tl.store(features_ptr + at, feature, mask=fits)
        tl.store(rows_ptr + at, tl.zeros([BLOCK], tl.int32) + row, mask=fits)
        begin += tl.sum(hit, axis=0)


def collect(
    scores: Float[Tensor, "part d_sae"], floor: Int[Tensor, " 2"] | None, first_row: int, out: PairList
) -> None:
    """Append the pairs of the rows from `first_row` on whose `scores`, upper bounds in fp16, are positive and reach the `floor`
    (as `kth.nth_largest` leaves it)."""
    d_sae = scores.shape[1]
    operands = (scores, floor, *out[:5], d_sae, first_row, out.features.numel(), _STEP, _LEAST)
    block = min(_BLOCK, 1 << (max(d_sae, 2) - 1).bit_length())
    launch(_collect_kernel, (scores.shape[0],), *operands, LOW_BITS=LOW_BITS, BLOCK=block, num_warps=_WARPS)


def empty_list(n_rows: int, room: int, device: torch.device) -> PairList:
    """A list for the candidates of `n_rows` rows."""
    ints = torch.zeros(2, room, dtype=torch.int32, device=device)
    rows = torch.zeros(2, n_rows, dtype=torch.int32, device=device)
    total = torch.zeros(1, dtype=torch.int32, device=device)
    return PairList(ints[0], ints[1], rows[0], rows[1], total, torch.zeros(room, dtype=torch.float32, device=device))
