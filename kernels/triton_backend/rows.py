"""Row by row over a weight matrix: norms, rounding to bfloat16, the decoder's projection, unit norm, Adam.

One program walks one row in blocks of columns. A row's second pass finds its few KB still in the cache, so every
operand is read from memory once and every result written once: the launch order cannot be improved on.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.triton_backend.launch import PRODUCTION, KernelSpec, kernel_spec, launch, packed

_BLOCK = 1024
_WARPS = 4


@triton.jit
@no_type_check
def _row_dot(a_ptr, b_ptr, start, d_in, BLOCK: tl.constexpr):
    """`<a, b>` of the `d_in` elements from `start` on: BLOCK running sums, then one sum over them."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + start + columns, mask=columns < d_in, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + start + columns, mask=columns < d_in, other=0.0).to(tl.float32)
        total += a * b
    return tl.sum(total, axis=0)


@triton.jit
@no_type_check
def _row_norms_kernel(W_ptr, norms_ptr, d_in, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    square = _row_dot(W_ptr, W_ptr, row.to(tl.int64) * d_in, d_in, BLOCK)
    tl.store(norms_ptr + row, tl.sqrt_rn(square))


@triton.jit
@no_type_check
def _round_rows_kernel(W_ptr, low_ptr, norms_ptr, lost_ptr, d_in, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    square, lost = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        w = tl.load(W_ptr + row * d_in + columns, mask=columns < d_in, other=0.0)
        low = w.to(low_ptr.dtype.element_ty)
        difference = low.to(tl.float32) - w
        square += w * w
        lost += difference * difference
        tl.store(low_ptr + row * width + columns, low, mask=columns < d_in)
    tl.store(norms_ptr + row, tl.sqrt_rn(tl.sum(square, axis=0)))
    tl.store(lost_ptr + row, tl.sqrt_rn(tl.sum(lost, axis=0)))


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


@triton.jit
@no_type_check
def _adam_kernel(
    W_ptr,
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    scale_ptr,
    low_ptr,
    d_in,
    step_size,
    to_exp_avg,
    beta2,
    to_exp_avg_sq,
    bias_correction2_sqrt,
    eps,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * d_in
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < d_in
        g = tl.load(gradient_ptr + start + columns, mask=inside, other=0.0)
        if scale_ptr is not None:
            g *= tl.load(scale_ptr)
        m = tl.load(exp_avg_ptr + start + columns, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq_ptr + start + columns, mask=inside, other=0.0)
        w = tl.load(W_ptr + start + columns, mask=inside, other=0.0)
        m += to_exp_avg * (g - m)
        v = beta2 * v + to_exp_avg_sq * g * g
        w -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), bias_correction2_sqrt) + eps)
        tl.store(exp_avg_ptr + start + columns, m, mask=inside)
        tl.store(exp_avg_sq_ptr + start + columns, v, mask=inside)
        tl.store(W_ptr + start + columns, w, mask=inside)
        if low_ptr is not None:
            tl.store(low_ptr + start + columns, w.to(low_ptr.dtype.element_ty), mask=inside)


def row_norms(W: Float[Tensor, "m d_in"]) -> Float[Tensor, " m"]:
    """`|W[f]|` of each row, in fp32; `W` may be bf16."""
    norms = torch.empty(W.shape[0], dtype=torch.float32, device=W.device)
    launch(_row_norms_kernel, (W.shape[0],), packed(W), norms, W.shape[1], BLOCK=_BLOCK, num_warps=_WARPS)
    return norms


def round_rows(
    W: Float[Tensor, "m d_in"], low: Float[Tensor, "m width"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Write `W`, rounded, in the first `d_in` columns of `low` (bf16); the norm of each row, and of what it lost."""
    norms, lost = torch.empty(2, W.shape[0], dtype=torch.float32, device=W.device)
    sizes = (W.shape[1], low.stride(0))
    launch(_round_rows_kernel, (W.shape[0],), packed(W), low, norms, lost, *sizes, BLOCK=_BLOCK, num_warps=_WARPS)
    return norms, lost


def project_(gradient: Float[Tensor, "m d_in"], W: Float[Tensor, "m d_in"]) -> None:
    """In place, per row: `gradient -= <gradient, W> W`, the part along the row `W` (whose norm is 1) taken out."""
    _check_in_place(gradient)
    launch(_project_kernel, (W.shape[0],), gradient, packed(W), W.shape[1], BLOCK=_BLOCK, num_warps=_WARPS)


def unit_norm_(W: Float[Tensor, "m d_in"], eps: float = torch.finfo(torch.float32).eps) -> None:
    """In place, per row: `W /= max(|W|, eps)`; a row of zeros stays zero."""
    _check_in_place(W)
    launch(_unit_norm_kernel, (W.shape[0],), W, W.shape[1], eps, BLOCK=_BLOCK, num_warps=_WARPS)


def adam_rows_(
    W: Float[Tensor, "m d_in"],
    gradient: Float[Tensor, "m d_in"],
    exp_avg: Float[Tensor, "m d_in"],
    exp_avg_sq: Float[Tensor, "m d_in"],
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    scale: Float[Tensor, ""] | None = None,
    low: Float[Tensor, "m d_in"] | None = None,
) -> None:
    """Update number `step` (the first is 1) of `torch.optim.Adam`, in place in `W` and both moments.

    `scale` multiplies the gradient, which is left as it is (clipping without a pass of its own, nor a wait for the
    number); `low` receives the new `W` in its own dtype, bf16 say.
    """
    for tensor in (W, exp_avg, exp_avg_sq, *([] if low is None else [low])):
        _check_in_place(tensor, tensor.dtype if tensor is low else torch.float32)
    correction1, correction2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    launch(
        _adam_kernel,
        (W.shape[0],),
        W,
        packed(gradient),
        exp_avg,
        exp_avg_sq,
        scale,
        low,
        W.shape[1],
        lr / correction1,
        1 - betas[0],  # in float64: in fp32 the difference would be off in its fifth digit
        betas[1],
        1 - betas[1],
        correction2**0.5,
        eps,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


def _check_in_place(tensor: Tensor, dtype: torch.dtype = torch.float32) -> None:
    if not tensor.is_contiguous() or tensor.dtype != dtype:
        raise ValueError(
            f"An in-place row operation needs a contiguous {dtype} matrix, got {tensor.dtype} with "
            f"shape {tuple(tensor.shape)} and strides {tensor.stride()}."
        )


def production_specs() -> list[KernelSpec]:
    """The compile report's entries. Every byte is compulsory, whatever the cache."""
    weights, norms = 4 * PRODUCTION.d_sae * PRODUCTION.d_in, 4 * PRODUCTION.d_sae
    adam_types = "*fp32 *fp32 *fp32 *fp32 *fp32 *bf16 i32" + " fp32" * 6
    adam_bytes = 7 * weights + weights // 2  # four read, three written, and the bf16 copy
    round_types = "*fp32 *bf16 *fp32 *fp32 i32 i32"
    block = {"BLOCK": _BLOCK}
    return [
        kernel_spec("row_norms", _row_norms_kernel, "*fp32 *fp32 i32", block, _WARPS, weights + norms),
        kernel_spec("round_rows", _round_rows_kernel, round_types, block, _WARPS, weights + weights // 2 + 2 * norms),
        kernel_spec("project_", _project_kernel, "*fp32 *fp32 i32", block, _WARPS, 3 * weights),
        kernel_spec("unit_norm_", _unit_norm_kernel, "*fp32 i32 fp32", block, _WARPS, 2 * weights),
        kernel_spec("adam_rows_", _adam_kernel, adam_types, block, _WARPS, adam_bytes),
    ]
