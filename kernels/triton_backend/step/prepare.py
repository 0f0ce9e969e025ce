"""Operands of a step: normalised rows, half-precision copies of rows and weights with columns that bound the error, variance.

The copies are in fp16: as fast as bf16 on tensor cores, with errors an eighth as large, so fewer pairs are candidates. What
exceeds its range is clamped, which the measured errors include: such a row is merely less certain.

With `x~` and `w~` the copies, the error of a product is at most

    |x~ . w~ - x . w|  <=  (|x - x~| + g |x~|) |w|  +  (1 + g) |x~| |w - w~|,   g = 2 gamma(width)

(`kernels/error_bounds.py`). Two columns of the operands add this bound to every score inside the product, with the measured
norms of each row, each feature and their rounding errors; two more carry the bias.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.search import gamma
from saelab.kernels.triton_backend.launch import INTERPRETED, ceil_div, launch, packed

EXTRA = 4
"""Columns after the `d_in` of a row: bias (2) and bound (2)."""
_ALIGNED = 32
_TAIL = 64
_BLOCK = 1024
_WARPS = 4
_ROWS, _COLUMNS = 64, 32


class Rows(NamedTuple):
    """The rows of a batch, as a step reads them."""

    x: Float[Tensor, "batch d_in"]
    """fp32, normalised, less the pre-bias."""
    low: Float[Tensor, "batch width"]
    """fp16 operand of the product."""
    bounds: Float[Tensor, "2 batch"]
    """What multiplies a feature's norm, and what multiplies the norm of its rounding error, in the bound."""


@triton.jit
@no_type_check
def _rounded_up(value):
    """An fp16 number that is not below `value`, infinite beyond the range of fp16."""
    up = tl.maximum(value + 0.0009765625 * tl.maximum(value, -value) + 5.9604644775390625e-08, -65504.0)
    return tl.where(up > 65504.0, float("inf"), up).to(tl.float16)


@triton.jit
@no_type_check
def _lowered(value):
    """The value in fp16, within its range."""
    return tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16)


@triton.jit(do_not_specialize=["d_in", "width"])
@no_type_check
def _prepare_rows_kernel(
    x_ptr, center_ptr, scale_ptr, bias_ptr, out_ptr, low_ptr, bounds_ptr, n_rows, d_in, width, growth,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr)
    square, errors = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < d_in
        x = tl.load(x_ptr + row * d_in + columns, mask=inside, other=0.0).to(tl.float32)
        x = (x - tl.load(center_ptr + columns, mask=inside, other=0.0)) * scale
        if bias_ptr is not None:
            x -= tl.load(bias_ptr + columns, mask=inside, other=0.0)
        x = tl.where(inside, x, 0.0)
        low = _lowered(x)
        difference = low.to(tl.float32) - x
        square += x * x
        errors += difference * difference
        tl.store(out_ptr + row * d_in + columns, x, mask=inside)
        tl.store(low_ptr + row * width + columns, low, mask=inside)
    size, error = tl.sqrt_rn(tl.sum(square, axis=0)), tl.sqrt_rn(tl.sum(errors, axis=0))
    by_norm = error + growth * (size + error)
    by_error = (1 + growth) * (size + error)
    tl.store(bounds_ptr + row, by_norm)
    tl.store(bounds_ptr + n_rows + row, by_error)
    tail = tl.arange(0, TAIL)
    value = tl.where(tail < 2, 1.0, tl.where(tail == 2, by_norm, tl.where(tail == 3, by_error, 0.0)))
    value = tl.where((tail == 2) | (tail == 3), _rounded_up(value), _lowered(value))
    tl.store(low_ptr + row * width + d_in + tail, value, mask=d_in + tail < width)


@triton.jit(do_not_specialize=["d_in", "width"])
@no_type_check
def _prepare_weights_kernel(
    W_ptr, bias_ptr, factors_ptr, floors_ptr, low_ptr, norms_ptr, d_sae, d_in, width,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if factors_ptr is not None:
        factor = tl.load(factors_ptr + feature)
    square, errors = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < d_in
        w = tl.load(W_ptr + feature * d_in + columns, mask=inside, other=0.0) * factor
        low = _lowered(w)
        difference = low.to(tl.float32) - w
        square += w * w
        errors += difference * difference
        tl.store(low_ptr + feature * width + columns, low, mask=inside)
    norm, error = tl.sqrt_rn(tl.sum(square, axis=0)), tl.sqrt_rn(tl.sum(errors, axis=0))
    tl.store(norms_ptr + feature, norm)
    tl.store(norms_ptr + d_sae + feature, error)
    bias = tl.load(bias_ptr + feature) * factor
    if floors_ptr is not None:  # rounded up
        floor = tl.load(floors_ptr + feature)
        bias = bias - floor + 1.0e-6 * (tl.maximum(bias, -bias) + tl.maximum(floor, -floor))
    high = _lowered(bias)
    tail = tl.arange(0, TAIL)
    rest = tl.where(tail == 1, bias - high.to(tl.float32), tl.where(tail == 2, norm, error))
    value = tl.where((tail > 0) & (tail < 4), _rounded_up(rest), tl.where(tail == 0, high, 0.0))
    tl.store(low_ptr + feature * width + d_in + tail, value, mask=d_in + tail < width)


@triton.jit(do_not_specialize=["n_rows", "d_in"])
@no_type_check
def _column_moments_kernel(x_ptr, means_ptr, squares_ptr, n_rows, d_in, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < d_in)[None, :]
    x = tl.load(x_ptr + rows[:, None] * d_in + columns[None, :], mask=inside, other=0.0)
    n = tl.minimum(n_rows - block * ROWS, ROWS).to(tl.float32)
    mean = tl.sum(x, axis=0) / n
    off = tl.where(inside, x - mean[None, :], 0.0)
    tl.store(means_ptr + block * d_in + columns, mean, mask=columns < d_in)
    tl.store(squares_ptr + block * d_in + columns, tl.sum(off * off, axis=0), mask=columns < d_in)


@triton.jit(do_not_specialize=["n_rows", "d_in", "n_blocks"])
@no_type_check
def _variance_kernel(
    means_ptr, squares_ptr, out_ptr, n_rows, d_in, n_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Chan et al. 1983: moments of the blocks put together, without the cancellation of `E[x^2] - E[x]^2`."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d_in
    mean, square = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    n = 0.0
    for block in range(0, n_blocks):
        added = tl.minimum(n_rows - block * ROWS, ROWS).to(tl.float32)
        off = tl.load(means_ptr + block * d_in + columns, mask=inside, other=0.0) - mean
        n += added
        mean += off * (added / n)
        square += tl.load(squares_ptr + block * d_in + columns, mask=inside, other=0.0) + off * off * (
            added * (n - added) / n
        )
    tl.store(out_ptr + tl.program_id(0), tl.sum(square, axis=0))


def width_of(d_in: int) -> int:
    """Length of an operand's row."""
    return ceil_div(d_in + EXTRA, _ALIGNED) * _ALIGNED


def prepare_rows(x: Tensor, center: Tensor, scale: Tensor, bias: Tensor | None, out: Rows) -> None:
    """Fill `out` with `(x - center) * scale - bias` of a batch of any float dtype."""
    (n_rows, d_in), width = x.shape, width_of(x.shape[1])
    growth = 2 * gamma(width, torch.float32)
    sizes = (n_rows, d_in, width, growth)
    operands = (packed(x), packed(center), scale, None if bias is None else packed(bias))
    launch(_prepare_rows_kernel, (n_rows,), *operands, *out, *sizes, BLOCK=_BLOCK, TAIL=_TAIL, num_warps=_WARPS)


def prepare_weights(
    W: Tensor, bias: Tensor, low: Tensor, norms: Tensor, factors: Tensor | None = None, floors: Tensor | None = None
) -> None:
    """Write the fp16 operand of the weights into `low (d_sae, width)`, and the norms of rows and of their rounding errors
    into `norms (2, d_sae)`; all of them times `factors`, one for each feature. With `floors`, one for each feature too, the
    products bound how far scores exceed these."""
    operands, sizes = (W, bias, factors, floors, low, norms), (*W.shape, low.shape[1])
    launch(_prepare_weights_kernel, (W.shape[0],), *operands, *sizes, BLOCK=_BLOCK, TAIL=_TAIL, num_warps=_WARPS)


def variance_of(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """`sum |x - mean(x)|^2`."""
    return variances_of(x).sum()


def variances_of(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, " tiles"]:
    """The sum over each tile of columns."""
    n_rows, d_in = x.shape
    n_blocks, n_tiles = ceil_div(n_rows, _ROWS), ceil_div(d_in, _COLUMNS)
    means, squares = torch.empty(2, n_blocks, d_in, dtype=torch.float32, device=x.device)
    parts = torch.empty(n_tiles, dtype=torch.float32, device=x.device)
    tile = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
    launch(_column_moments_kernel, (n_blocks, n_tiles), x, means, squares, n_rows, d_in, **tile, num_warps=_WARPS)
    launch(_variance_kernel, (n_tiles,), means, squares, parts, n_rows, d_in, n_blocks, **tile, num_warps=1)
    return parts


def product(a: Float[Tensor, "rows width"], b: Float[Tensor, "d_sae width"], out: Float[Tensor, "rows d_sae"]) -> None:
    """`out = a @ b.T` in fp16, summed in fp32: partial sums are never rounded to fp16, which the bound does not cover."""
    if INTERPRETED:  # a CPU's fp16 product may round partial sums
        out.copy_(a.float() @ b.float().T)
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    try:
        torch.mm(a, b.T, out=out)
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before
