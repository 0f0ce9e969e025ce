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


class Dense(NamedTuple):
    """Room for the dense matrices of a step, all fp16."""

    feature_acts: Float[Tensor, "batch d_sae"]
    dacts: Float[Tensor, "batch d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]


@triton.jit(do_not_specialize=["k", "d_sae"])
@no_type_check
def _scatter_kernel(values_ptr, features_ptr, counts_ptr, from_ptr, to_ptr, k, d_sae, BLOCK: tl.constexpr):
    """Write `values`, or what `from` holds at the same places, to the kept places of `to`."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK)
    real = slot < tl.load(counts_ptr + row)
    at = row * d_sae + tl.load(features_ptr + row * k + slot, mask=real, other=0)
    if from_ptr is None:
        value = tl.load(values_ptr + row * k + slot, mask=real, other=0.0).to(tl.float16)
    else:
        value = tl.load(from_ptr + at, mask=real, other=0.0)
    tl.store(to_ptr + at, value, mask=real)


def dense_pays(d_sae: int, k: int) -> bool:
    """Whether dense products beat gathers."""
    return 2 * k < d_sae <= _PAYS * k


def decode_dense(
    selection: Selection, W_dec: Tensor, bias: Tensor | None, target: Tensor, room: Dense
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, ""]]:
    """Reconstruction minus target, and its squared norm, as `spmm_residual`."""
    room.feature_acts.zero_()
    _scatter(selection, None, room.feature_acts)
    room.W_dec.copy_(W_dec)
    residual = torch.empty_like(target)
    _product(room.feature_acts, room.W_dec, residual)
    residual -= target
    residual = residual if bias is None else residual.add_(bias)
    return residual, torch.dot(residual.view(-1), residual.view(-1))


def dense_gradients(
    selection: Selection, low: Tensor, residual: Tensor, variance: Tensor, room: Dense, out: Gradients
) -> None:
    """Fill `out` as `fill_gradients` does; `low (batch, d_in)` are the rows in fp16."""
    g = residual.half()
    torch.mm(g, room.W_dec.T, out=room.dacts)
    _product(room.feature_acts.T, g, out.W_dec)
    _scatter(selection, room.dacts, room.feature_acts)  # from here on the gradients of the kept activations
    _product(room.feature_acts.T, low, out.W_enc)
    torch.sum(room.feature_acts, 0, dtype=torch.float32, out=out.b_enc)
    scale = 2 / variance  # not finite if all rows are the same, and then nothing is updated
    for gradient in out:
        gradient *= scale


def _scatter(selection: Selection, source: Tensor | None, to: Tensor) -> None:
    values, features, counts, _ = selection
    n_rows, k = values.shape
    operands = (values, features, counts, source, to, k, to.shape[1])
    launch(_scatter_kernel, (n_rows,), *operands, BLOCK=1 << (max(k, 2) - 1).bit_length(), num_warps=1)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b` of fp16 operands in fp32."""
    if INTERPRETED:
        torch.mm(a.float(), b.float(), out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def empty_dense(n_rows: int, W_dec: Tensor, dacts: Tensor) -> Dense:
    """Room for a batch of `n_rows` rows; `dacts` is memory that is free while gradients are computed."""
    feature_acts = torch.empty(n_rows, W_dec.shape[0], dtype=torch.float16, device=W_dec.device)
    return Dense(
        feature_acts,
        dacts[: feature_acts.numel()].view(feature_acts.shape),
        torch.empty_like(W_dec, dtype=torch.float16),
    )
