"""AuxK of a step: `saelab.losses.auxk` and its gradients over the dead features of a bucket, whose number is on the device.

    e_hat = z W_dec[ids],   z = the k_aux largest of ReLU(x W_enc[ids]^T + b_enc[ids]),   AuxK = |e_hat - e|^2 / |e - mean(e)|^2

or, where activations are signed, those of largest magnitude, without the ReLU.

Dense products of fp32 operands, as k_aux is usually large against the number of dead features. They gather the rows of the
weights by id and add to the rows of the gradients, so the dead features are never copied. Every sum runs over blocks of fixed
size, in order, up to the number of dead features: the bits are independent of the bucket's capacity, and of how the batch is cut
into slices of rows.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.triton_backend.group_max import tile_product
from saelab.kernels.triton_backend.launch import INTERPRETED, ceil_div, launch
from saelab.kernels.triton_backend.step.bucket import Bucket, empty_bucket, keep_largest, list_dead
from saelab.kernels.triton_backend.step.gradients import Gradients
from saelab.kernels.triton_backend.step.prepare import variances_of

_TILE, _DEPTH = (16, 16) if INTERPRETED else (64, 32)
_WARPS = 4
_MOST = 1 << 27
"""Entries of each of the two matrices of a bucket (512 MiB); a batch with more is cut into slices."""
_TINY = torch.finfo(torch.float32).tiny
_ROUNDING = (4 * torch.finfo(torch.float32).eps) ** 2
"""A residual whose variance is below this share of its squared norm is the same in all rows, but for rounding."""


class Aux(NamedTuple):
    """AuxK of a batch, and room for it."""

    bucket: Bucket
    k_aux: int
    alpha: float
    slices: list[slice]
    """Of the batch, at most as many rows as the bucket has."""
    difference: Float[Tensor, "rows d_in"]
    losses: Float[Tensor, "row_tiles column_tiles"]
    """The share of each tile of `e_hat` in the loss."""
    signed: bool


@triton.jit(do_not_specialize=["n_rows"])
@no_type_check
def _encode_kernel(
    x_ptr, W_ptr, ids_ptr, count_ptr, bias_ptr, floors_ptr, kept_ptr, out_ptr, n_rows, capacity,
    SIGNED: tl.constexpr, D_IN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`u = <x, W[id]> + bias[id]` if signed, otherwise its ReLU, or that of `floor[id] - u`; without a bias `<x, W[id]>` where
    what is kept is not 0."""
    count, first = tl.load(count_ptr), tl.program_id(0) * TILE
    if first >= count:
        return
    slot = first + tl.arange(0, TILE)
    row = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside, real = row < n_rows, slot < count
    feature = tl.load(ids_ptr + slot, mask=real, other=0).to(tl.int64)
    out = tile_product(x_ptr + row * D_IN, W_ptr + feature * D_IN, inside, real, D_IN, False, TILE, TILE, DEPTH)
    at, mask = row[:, None] * capacity + slot[None, :], inside[:, None] & real[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + feature, mask=real, other=0.0)[None, :]
        if floors_ptr is not None:
            out = tl.load(floors_ptr + feature, mask=real, other=0.0)[None, :] - out
        if not SIGNED:
            out = tl.where(out <= 0, 0.0, out)  # NaN stays
    else:
        out = tl.where(tl.load(kept_ptr + at, mask=mask, other=0.0) == 0, 0.0, out)
    tl.store(out_ptr + at, out, mask=mask)


@triton.jit
@no_type_check
def _inverse_variance(error_ptr, variances_ptr, n_variances, tiny, rounding, VARIANCES: tl.constexpr):
    """What a squared error is multiplied by to be an FVU, 0 if there is nothing to explain (`losses.fvu_of_rest`)."""
    at = tl.arange(0, VARIANCES)
    variance = tl.sum(tl.load(variances_ptr + at, mask=at < n_variances, other=0.0), axis=0)
    varies = (variance > tiny) & (variance > rounding * tl.load(error_ptr))
    return tl.where(varies, 1.0 / tl.where(varies, variance, 1.0), 0.0)


@triton.jit(do_not_specialize=["n_rows"])
@no_type_check
def _decode_kernel(
    feature_acts_ptr, W_ptr, ids_ptr, count_ptr, residual_ptr, error_ptr, variances_ptr, times_ptr, out_ptr, losses_ptr,
    n_rows, capacity, n_variances, weight, tiny, rounding,
    VARIANCES: tl.constexpr, D_IN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient of `weight` (times a number on the device) times the loss with respect to `e_hat`, and each tile's share of
    the loss; `e = -residual`."""
    count = tl.load(count_ptr)
    losses_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if count == 0:
        tl.store(losses_ptr, 0.0)
        return
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside, within = row < n_rows, column < D_IN
    sums = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, count, DEPTH):
        slot = first + tl.arange(0, DEPTH)
        real = slot < count
        feature = tl.load(ids_ptr + slot, mask=real, other=0).to(tl.int64)
        at_z, at_w = row[:, None] * capacity + slot[None, :], feature[:, None] * D_IN + column[None, :]
        z = tl.load(feature_acts_ptr + at_z, mask=inside[:, None] & real[None, :], other=0.0)
        w = tl.load(W_ptr + at_w, mask=real[:, None] & within[None, :], other=0.0)
        sums = tl.dot(z, w, sums, input_precision="ieee")
    at, mask = row[:, None] * D_IN + column[None, :], inside[:, None] & within[None, :]
    difference = sums + tl.load(residual_ptr + at, mask=mask, other=0.0)
    scale = _inverse_variance(error_ptr, variances_ptr, n_variances, tiny, rounding, VARIANCES)
    if times_ptr is not None:
        weight *= tl.load(times_ptr)
    tl.store(out_ptr + at, difference * (2.0 * weight * scale), mask=mask)
    tl.store(losses_ptr, tl.sum(tl.sum(difference * difference, axis=1), axis=0) * scale)


@triton.jit(do_not_specialize=["n_rows"])
@no_type_check
def _add_gradients_kernel(
    feature_acts_ptr, dacts_ptr, x_ptr, difference_ptr, ids_ptr, count_ptr, dW_enc_ptr, dW_dec_ptr, db_enc_ptr, n_rows,
    capacity, D_IN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Add the sums over the rows to the gradients of the dead features, beginning with what these already are."""
    count, first = tl.load(count_ptr), tl.program_id(0) * TILE
    if first >= count:
        return
    is_enc = tl.program_id(2) == 0
    factors_ptr, from_ptr, to_ptr = feature_acts_ptr, difference_ptr, dW_dec_ptr
    if is_enc:
        factors_ptr, from_ptr, to_ptr = dacts_ptr, x_ptr, dW_enc_ptr
    slot, column = first + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    real, within = slot < count, column < D_IN
    feature = tl.load(ids_ptr + slot, mask=real, other=0).to(tl.int64)
    at, mask = feature[:, None] * D_IN + column[None, :], real[:, None] & within[None, :]
    sums, b = tl.load(to_ptr + at, mask=mask, other=0.0), tl.load(db_enc_ptr + feature, mask=real, other=0.0)
    for start in range(0, n_rows, DEPTH):
        row = (start + tl.arange(0, DEPTH)).to(tl.int64)
        inside = row < n_rows
        at_z, at_x = row[None, :] * capacity + slot[:, None], row[:, None] * D_IN + column[None, :]
        factor = tl.load(factors_ptr + at_z, mask=real[:, None] & inside[None, :], other=0.0)
        x = tl.load(from_ptr + at_x, mask=inside[:, None] & within[None, :], other=0.0)
        sums = tl.dot(factor, x, sums, input_precision="ieee")
        b += tl.sum(factor, axis=1)
    tl.store(to_ptr + at, sums, mask=mask)
    tl.store(db_enc_ptr + feature, b, mask=real & is_enc & (tl.program_id(1) == 0))


def slices_for(capacity: int, n_rows: int) -> list[slice]:
    """Slices of a batch for matrices of `capacity` columns; multiples of the tiles, so that they change no sum."""
    at_once = max(1, _MOST // capacity // _TILE) * _TILE
    return [slice(start, min(start + at_once, n_rows)) for start in range(0, n_rows, at_once)]


def empty_aux(capacity: int, k_aux: int, alpha: float, x: Float[Tensor, "batch d_in"], signed: bool = False) -> Aux:
    """Room for AuxK, of weight `alpha` in the loss, of batches like `x` with up to `capacity` dead features."""
    n_rows, d_in = x.shape
    slices = slices_for(capacity, n_rows)
    rows = slices[0].stop
    losses = torch.empty(ceil_div(n_rows, _TILE), ceil_div(d_in, _TILE), dtype=torch.float32, device=x.device)
    return Aux(empty_bucket(capacity, rows, x.device), k_aux, alpha, slices, x.new_empty(rows, d_in), losses, signed)


class Weights(NamedTuple):
    """What AuxK reads of an SAE."""

    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]


def add_auxk(
    x: Float[Tensor, "batch d_in"], residual: Float[Tensor, "batch d_in"], error: Float[Tensor, ""], weights: Weights,
    dead: tuple[Tensor, int], aux: Aux, gradients: Gradients, times: Float[Tensor, ""] | None = None,
) -> None:  # fmt: skip
    """Add the gradients of AuxK to `gradients`, and write the shares of its loss to `aux.losses`: all 0 if no feature is dead.

    `residual` is the reconstruction minus its target and `error` its squared norm; `dead` are the counters of the features
    and from where on they are dead. The gradients are multiplied by `times`, the loss is not.
    """
    list_dead(*dead, aux.bucket)
    moments = error, variances_of(residual), times
    for rows in aux.slices:
        _add_slice(x[rows], residual[rows], moments, weights, aux, gradients, aux.losses[rows.start // _TILE :])


def _add_slice(
    x: Tensor, residual: Tensor, moments: tuple[Tensor, Tensor, Tensor | None], weights: Weights, aux: Aux, gradients: Gradients,
    losses: Tensor,
) -> None:  # fmt: skip
    """The same for a slice of the batch; `moments` are squared norm and variances of the full residual, and `times`."""
    (n_rows, d_in), (ids, count, feature_acts, dacts), capacity = x.shape, aux.bucket, aux.bucket.ids.shape[0]
    tile, dead, sizes = _tile(d_in), (ids, count), (n_rows, capacity)
    slots, row_tiles, columns = ceil_div(capacity, _TILE), ceil_div(n_rows, _TILE), ceil_div(d_in, _TILE)
    encode_dead(x, weights.W_enc, aux.bucket, weights.b_enc, None, None, feature_acts, aux.signed)
    keep_largest(feature_acts[:n_rows], count, aux.k_aux)
    operands = (feature_acts, weights.W_dec, *dead, residual, *moments, aux.difference, losses)
    n_variances = len(moments[1])
    numbers, padded = (n_variances, aux.alpha, _TINY, _ROUNDING), 1 << (n_variances - 1).bit_length()
    launch(_decode_kernel, (columns, row_tiles), *operands, *sizes, *numbers, VARIANCES=padded, **tile)
    encode_dead(aux.difference[:n_rows], weights.W_dec, aux.bucket, None, None, feature_acts, dacts)
    operands = (feature_acts, dacts, x, aux.difference, *dead, gradients.W_enc, gradients.W_dec, gradients.b_enc)
    launch(_add_gradients_kernel, (slots, columns, 2), *operands, *sizes, **tile)


def encode_dead(
    x: Tensor, W: Tensor, bucket: Bucket, bias: Tensor | None, floors: Tensor | None, kept: Tensor | None, out: Tensor,
    signed: bool = False,
) -> None:  # fmt: skip
    """Fill the rows of `out` with what the dead features make of the rows of `x` (`_encode_kernel`)."""
    (n_rows, d_in), capacity = x.shape, bucket.ids.shape[0]
    operands = (x, W, bucket.ids, bucket.count, bias, floors, kept, out, n_rows, capacity)
    launch(
        _encode_kernel, (ceil_div(capacity, _TILE), ceil_div(n_rows, _TILE)), *operands, SIGNED=signed, **_tile(d_in)
    )


def _tile(d_in: int) -> dict[str, int]:
    return {"D_IN": d_in, "TILE": _TILE, "DEPTH": _DEPTH, "num_warps": _WARPS}
