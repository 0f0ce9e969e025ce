"""Row-wise passes over a weight matrix: rounding to bfloat16 with norms, projection of the decoder's gradient, unit norm.

One program processes one row in blocks of columns. In the second pass over a row its few KB are still cached, so every
operand is read from device memory once and every result is written once: the minimum possible traffic.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.triton_backend.launch import launch, packed

_BLOCK = 1024
_WARPS = 4


@triton.jit
@no_type_check
def _row_dot(a_ptr, b_ptr, start, d_in, BLOCK: tl.constexpr):
    """`<a, b>` over the `d_in` elements from `start`: BLOCK running sums, then one sum over them."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + start + columns, mask=columns < d_in, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + start + columns, mask=columns < d_in, other=0.0).to(tl.float32)
        total += a * b
    return tl.sum(total, axis=0)


@triton.jit
@no_type_check
def _round_rows_kernel(W_ptr, low_ptr, norms_ptr, errors_ptr, d_in, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    square, errors = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        w = tl.load(W_ptr + row * d_in + columns, mask=columns < d_in, other=0.0)
        low = w.to(low_ptr.dtype.element_ty)
        difference = low.to(tl.float32) - w
        square += w * w
        errors += difference * difference
        tl.store(low_ptr + row * width + columns, low, mask=columns < d_in)
    tl.store(norms_ptr + row, tl.sqrt_rn(tl.sum(square, axis=0)))
    tl.store(errors_ptr + row, tl.sqrt_rn(tl.sum(errors, axis=0)))


@triton.jit
@no_type_check
def _project_kernel(gradient_ptr, W_ptr, d_in, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * d_in
    parallel = _row_dot(gradient_ptr, W_ptr, start, d_in, BLOCK)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < d_in
        g = tl.load(gradient_ptr + start + columns, mask=inside, other=0.0)
        w = tl.load(W_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(gradient_ptr + start + columns, g - parallel * w, mask=inside)


@triton.jit
@no_type_check
def _unit_norm_kernel(W_ptr, d_in, eps, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * d_in
    norm = tl.maximum(tl.sqrt_rn(_row_dot(W_ptr, W_ptr, start, d_in, BLOCK)), eps)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        w = tl.load(W_ptr + start + columns, mask=columns < d_in, other=0.0)
        tl.store(W_ptr + start + columns, tl.div_rn(w, norm), mask=columns < d_in)


def round_rows(
    W: Float[Tensor, "m d_in"], low: Float[Tensor, "m width"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Write `W`, rounded, into the first `d_in` columns of `low` (bf16); returns the norms of each row and its error."""
    norms, errors = torch.empty(2, W.shape[0], dtype=torch.float32, device=W.device)
    sizes = (W.shape[1], low.stride(0))
    launch(_round_rows_kernel, (W.shape[0],), packed(W), low, norms, errors, *sizes, BLOCK=_BLOCK, num_warps=_WARPS)
    return norms, errors


def project_(gradient: Float[Tensor, "m d_in"], W: Float[Tensor, "m d_in"]) -> None:
    """In place, per row: `gradient -= <gradient, W> W`, which removes the component along the unit-norm row of `W`."""
    _check_in_place(gradient)
    launch(_project_kernel, (W.shape[0],), gradient, packed(W), W.shape[1], BLOCK=_BLOCK, num_warps=_WARPS)


def unit_norm_(W: Float[Tensor, "m d_in"], eps: float = torch.finfo(torch.float32).eps) -> None:
    """In place, per row: `W /= max(|W|, eps)`; a row of zeros stays zero."""
    _check_in_place(W)
    launch(_unit_norm_kernel, (W.shape[0],), W, W.shape[1], eps, BLOCK=_BLOCK, num_warps=_WARPS)


def _check_in_place(tensor: Tensor) -> None:
    if not tensor.is_contiguous() or tensor.dtype != torch.float32:
        raise ValueError(
            f"An in-place row operation needs a contiguous torch.float32 matrix, got {tensor.dtype} with "
            f"shape {tuple(tensor.shape)} and strides {tensor.stride()}."
        )
