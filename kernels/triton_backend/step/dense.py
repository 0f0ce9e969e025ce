"""Decoding and gradients by dense products, where k is so large against d_sae that gathering rows takes longer.

As under autocast, products have fp16 operands and fp32 sums. Selections stay exact: only pairs that might or might not be
among the k largest need their exact value, the others keep that of the product that found them.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.triton_backend.launch import INTERPRETED, launch
from saelab.kernels.triton_backend.step.gradients import Gradients
from saelab.kernels.triton_backend.step.select import Selection

_PAYS = 144
"""Features per kept pair of a token up to which it pays. With gathers at 6.5 TB/s and products at 700 TFLOP/s (H100), four
gathers of k rows take 215 k / d_sae times as long as four products; it has to be one and a half times."""
_BLOCK, _WARPS = 1024, 4


class Dense(NamedTuple):
    """Room for the dense matrices of a step, all fp16."""

    feature_acts: Float[Tensor, "batch d_sae"]
    dacts: Float[Tensor, "batch d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    residual: Float[Tensor, "batch d_in"]


@triton.jit(do_not_specialize=["k", "d_sae"])
@no_type_check
def _scatter_kernel(
    values_ptr, features_ptr, counts_ptr, from_ptr, to_ptr, k, d_sae, BLOCK: tl.constexpr, CLEARED: tl.constexpr
):  # fmt: skip
    """Write `values` to the kept places of `to` and 0 to the others; or only what `from` holds at the same places."""
    row = tl.program_id(0).to(tl.int64)
    if from_ptr is None:
        for first in range(0, d_sae, CLEARED):
            feature = first + tl.arange(0, CLEARED)
            tl.store(to_ptr + row * d_sae + feature, tl.zeros([CLEARED], tl.float16), mask=feature < d_sae)
        tl.debug_barrier()  # other threads of this program write the values
    slot = tl.arange(0, BLOCK)
    real = slot < tl.load(counts_ptr + row)
    at = row * d_sae + tl.load(features_ptr + row * k + slot, mask=real, other=0)
    if from_ptr is None:
        value = tl.load(values_ptr + row * k + slot, mask=real, other=0.0).to(tl.float16)
    else:
        value = tl.load(from_ptr + at, mask=real, other=0.0)
    tl.store(to_ptr + at, value, mask=real)


@triton.jit(do_not_specialize=["d_in"])
@no_type_check
def _residual_kernel(out_ptr, target_ptr, bias_ptr, low_ptr, squares_ptr, d_in, BLOCK: tl.constexpr):
    """Add the bias to a row, subtract its target, and write the result in fp16 too, and its squared norm."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, d_in, BLOCK):
        column = first + tl.arange(0, BLOCK)
        at, inside = row * d_in + column, column < d_in
        out = tl.load(out_ptr + at, mask=inside, other=0.0) - tl.load(target_ptr + at, mask=inside, other=0.0)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + column, mask=inside, other=0.0)
        tl.store(out_ptr + at, out, mask=inside)
        tl.store(low_ptr + at, out.to(tl.float16), mask=inside)
        squares += out * out
    tl.store(squares_ptr + row, tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["d_in"])
@no_type_check
def _scale_kernel(dW_enc_ptr, dW_dec_ptr, db_enc_ptr, variance_ptr, d_in, BLOCK: tl.constexpr):
    """Multiply the gradients of a feature by `2 / variance`."""
    feature = tl.program_id(0).to(tl.int64)
    scale = 2.0 / tl.load(variance_ptr)  # not finite if all rows are the same, and then nothing is updated
    for first in range(0, d_in, BLOCK):
        column = first + tl.arange(0, BLOCK)
        at, inside = feature * d_in + column, column < d_in
        tl.store(dW_enc_ptr + at, tl.load(dW_enc_ptr + at, mask=inside, other=0.0) * scale, mask=inside)
        tl.store(dW_dec_ptr + at, tl.load(dW_dec_ptr + at, mask=inside, other=0.0) * scale, mask=inside)
    tl.store(db_enc_ptr + feature, tl.load(db_enc_ptr + feature) * scale)


def dense_pays(d_sae: int, k: int) -> bool:
    """Whether dense products beat gathers."""
    return 2 * k < d_sae <= _PAYS * k


def decode_dense(
    selection: Selection, W_dec: Tensor, bias: Tensor | None, target: Tensor, room: Dense
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, ""]]:
    """Reconstruction minus target, and its squared norm, as `spmm_residual`."""
    _scatter(selection, None, room.feature_acts)
    room.W_dec.copy_(W_dec)
    residual = torch.empty_like(target)
    _product(room.feature_acts, room.W_dec, residual)
    (n_rows, d_in), squares = target.shape, target.new_empty(len(target))
    operands = (residual, target, bias, room.residual, squares, d_in)
    launch(_residual_kernel, (n_rows,), *operands, BLOCK=_BLOCK, num_warps=_WARPS)
    return residual, squares.sum()


def dense_gradients(selection: Selection, low: Tensor, variance: Tensor, room: Dense, out: Gradients) -> None:
    """Fill `out` as `fill_gradients` does, after `decode_dense`; `low (batch, d_in)` are the rows in fp16."""
    torch.mm(room.residual, room.W_dec.T, out=room.dacts)
    _product(room.feature_acts.T, room.residual, out.W_dec)
    _scatter(selection, room.dacts, room.feature_acts)  # from here on the gradients of the kept activations
    _product(room.feature_acts.T, low, out.W_enc)
    torch.sum(room.feature_acts, 0, dtype=torch.float32, out=out.b_enc)
    d_sae, d_in = out.W_dec.shape
    operands = (out.W_enc, out.W_dec, out.b_enc, variance, d_in)
    launch(_scale_kernel, (d_sae,), *operands, BLOCK=_BLOCK, num_warps=_WARPS)


def _scatter(selection: Selection, source: Tensor | None, to: Tensor) -> None:
    values, features, counts, _ = selection
    n_rows, k = values.shape
    operands = (values, features, counts, source, to, k, to.shape[1])
    block = 1 << (max(k, 2) - 1).bit_length()
    launch(_scatter_kernel, (n_rows,), *operands, BLOCK=block, CLEARED=_BLOCK, num_warps=_WARPS)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b` of fp16 operands in fp32."""
    if INTERPRETED:
        torch.mm(a.float(), b.float(), out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def empty_dense(n_rows: int, W_dec: Tensor, dacts: Tensor) -> Dense:
    """Room for a batch of `n_rows` rows; `dacts` is memory that is free while gradients are computed."""
    d_sae, d_in = W_dec.shape
    feature_acts, residual = (W_dec.new_empty(n_rows, width, dtype=torch.float16) for width in (d_sae, d_in))
    return Dense(
        feature_acts,
        dacts[: feature_acts.numel()].view(feature_acts.shape),
        torch.empty_like(W_dec, dtype=torch.float16),
        residual,
    )
