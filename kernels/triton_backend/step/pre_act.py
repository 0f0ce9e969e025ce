"""How JumpReLU revives dead features by their pre-activations, and the gradients of that, for the features of a bucket:

    L = weight sum_t sum_(i dead) max(theta_i - u_ti, 0) |d_i|,   u = W_enc x + b_enc

As for AuxK (`auxk.py`) the number of dead features stays on the device, and no bit depends on the room for them: every sum runs
over the rows in blocks of fixed size, in order, whatever slices the batch is cut into.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.triton_backend.launch import INTERPRETED, ceil_div, launch
from saelab.kernels.triton_backend.step.auxk import Weights, encode_dead, slices_for
from saelab.kernels.triton_backend.step.bucket import Bucket, empty_bucket, list_dead
from saelab.kernels.triton_backend.step.gradients import Gradients

_TILE, _DEPTH = (16, 16) if INTERPRETED else (64, 32)
_WARPS = 4
_BLOCK = 1024


class PreAct(NamedTuple):
    """The term of a batch, and room for it."""

    bucket: Bucket
    """Ids and count only."""
    shortfalls: Float[Tensor, "rows capacity"]
    """`max(theta - u, 0)` of a slice."""
    sums: Float[Tensor, "2 capacity"]
    """Of each dead feature the sum of its shortfalls, and how many there are."""
    weight: float
    slices: list[slice]
    losses: Float[Tensor, " capacity"]
    """The share of each dead feature in the term, without its weight."""


@triton.jit(do_not_specialize=["n_rows"])
@no_type_check
def _add_rows_kernel(
    shortfalls_ptr, x_ptr, norms_ptr, ids_ptr, count_ptr, dW_enc_ptr, db_enc_ptr, sums_ptr, n_rows, capacity, weight,
    D_IN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Add the sums over the rows to the encoder's gradients and to `sums`, beginning with what these already are."""
    count, first = tl.load(count_ptr), tl.program_id(0) * TILE
    if first >= count:
        return
    slot, column = first + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    real, within = slot < count, column < D_IN
    feature = tl.load(ids_ptr + slot, mask=real, other=0).to(tl.int64)
    slope = -weight * tl.load(norms_ptr + feature, mask=real, other=0.0)
    at, mask = feature[:, None] * D_IN + column[None, :], real[:, None] & within[None, :]
    dW, b = tl.load(dW_enc_ptr + at, mask=mask, other=0.0), tl.load(db_enc_ptr + feature, mask=real, other=0.0)
    total = tl.load(sums_ptr + slot, mask=real, other=0.0)
    below = tl.load(sums_ptr + capacity + slot, mask=real, other=0.0)
    for start in range(0, n_rows, DEPTH):
        row = (start + tl.arange(0, DEPTH)).to(tl.int64)
        inside = row < n_rows
        at_s, at_x = row[None, :] * capacity + slot[:, None], row[:, None] * D_IN + column[None, :]
        shortfall = tl.load(shortfalls_ptr + at_s, mask=real[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptr + at_x, mask=inside[:, None] & within[None, :], other=0.0)
        d = tl.where(shortfall > 0, slope[:, None], 0.0)
        dW = tl.dot(d, x, dW, input_precision="ieee")
        b += tl.sum(d, axis=1)
        total += tl.sum(shortfall, axis=1)
        below += tl.sum((shortfall > 0).to(tl.float32), axis=1)
    tl.store(dW_enc_ptr + at, dW, mask=mask)
    if tl.program_id(1) == tl.num_programs(1) - 1:
        tl.store(db_enc_ptr + feature, b, mask=real)
        tl.store(sums_ptr + slot, total, mask=real)
        tl.store(sums_ptr + capacity + slot, below, mask=real)


@triton.jit(do_not_specialize=["d_in"])
@no_type_check
def _add_sums_kernel(
    sums_ptr, norms_ptr, theta_ptr, W_dec_ptr, ids_ptr, count_ptr, dW_dec_ptr, dtheta_ptr, losses_ptr, d_in, capacity, weight,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a dead feature's decoder row and log-threshold; its share in the term."""
    slot = tl.program_id(0)
    if slot >= tl.load(count_ptr):
        tl.store(losses_ptr + slot, 0.0)
        return
    feature = tl.load(ids_ptr + slot).to(tl.int64)
    norm, total, below = tl.load(norms_ptr + feature), tl.load(sums_ptr + slot), tl.load(sums_ptr + capacity + slot)
    along = tl.where(norm > 0, weight * total / tl.where(norm > 0, norm, 1.0), 0.0)
    for first in range(0, d_in, BLOCK):
        column = first + tl.arange(0, BLOCK)
        at, inside = feature * d_in + column, column < d_in
        w = tl.load(W_dec_ptr + at, mask=inside, other=0.0)
        tl.store(dW_dec_ptr + at, tl.load(dW_dec_ptr + at, mask=inside, other=0.0) + along * w, mask=inside)
    more = weight * below * norm * tl.load(theta_ptr + feature)
    tl.store(dtheta_ptr + feature, tl.load(dtheta_ptr + feature) + more)
    tl.store(losses_ptr + slot, total * norm)


def empty_pre_act(capacity: int, weight: float, x: Float[Tensor, "batch d_in"]) -> PreAct:
    """Room for the term, of this `weight` in the loss, of batches like `x` with up to `capacity` dead features."""
    slices = slices_for(capacity, len(x))
    sums, losses = x.new_empty(2, capacity), x.new_empty(capacity)
    bucket = empty_bucket(capacity, 0, x.device)
    return PreAct(bucket, x.new_empty(slices[0].stop, capacity), sums, weight, slices, losses)


def add_pre_act(
    x: Float[Tensor, "batch d_in"], weights: Weights, theta: Float[Tensor, " d_sae"], norms: Float[Tensor, " d_sae"],
    dead: tuple[Tensor, int], room: PreAct, gradients: Gradients, dtheta: Float[Tensor, " d_sae"],
) -> None:  # fmt: skip
    """Add the gradients of the term to `gradients`, and to `dtheta` that of the logarithm of `theta`; write its shares to
    `room.losses`. `norms` are those of decoder rows; `dead` are the counters of the features and from where on they are dead."""
    (ids, count, *_), d_in, capacity = room.bucket, x.shape[1], room.bucket.ids.shape[0]
    list_dead(*dead, room.bucket)
    room.sums.zero_()
    grid = ceil_div(capacity, _TILE), ceil_div(d_in, _TILE)
    for rows in room.slices:
        encode_dead(x[rows], weights.W_enc, room.bucket, weights.b_enc, theta, None, room.shortfalls)
        operands = (room.shortfalls, x[rows], norms, ids, count, gradients.W_enc, gradients.b_enc, room.sums)
        sizes = (rows.stop - rows.start, capacity, room.weight)
        launch(_add_rows_kernel, grid, *operands, *sizes, D_IN=d_in, TILE=_TILE, DEPTH=_DEPTH, num_warps=_WARPS)
    operands = (room.sums, norms, theta, weights.W_dec, ids, count, gradients.W_dec, dtheta, room.losses)
    launch(_add_sums_kernel, (capacity,), *operands, d_in, capacity, room.weight, BLOCK=_BLOCK, num_warps=_WARPS)
