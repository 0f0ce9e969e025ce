"""`spmm` in Triton: each row's weighted sum of the rows of `W` that fire, with bias, target and loss in the epilogue.

Launch order: d_in is cut into tiles, the slowest grid axis, as wide as possible while a tile of `W` stays in the cache (32
fp32 columns, 17 MB, at d_sae 131072). Within a tile the rows of the batch are processed in order and gather from the
cache, so `W` is read from memory once; whole rows would be read k * batch / d_sae times. The ids and values (6 MB) also
fit in the cache beside the tile. Every output element is one sum in a fixed order, written once.
"""

from __future__ import annotations

from typing import Literal, no_type_check, overload

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.launch import (
    ceil_div,
    launch,
    packed,
)
from saelab.kernels.triton_backend.sddmm import CACHE_BYTES, sum_slices

_TILE = 2048
"""Elements of `W` that a program gathers at a time: the wider the tile, the fewer pairs."""
_WARPS = 2


@triton.jit(do_not_specialize=["n_rows"])
@no_type_check
def _spmm_fwd_kernel(
    values_ptr,
    features_ptr,
    offsets_ptr,
    W_ptr,
    bias_ptr,
    target_ptr,
    out_ptr,
    squares_ptr,
    n_rows,
    d_in,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d_in
    last = tl.load(offsets_ptr + row + 1)
    sums = tl.zeros([PAIRS, COLUMNS], tl.float32)
    for first in range(tl.load(offsets_ptr + row), last, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        values = tl.load(values_ptr + pairs, mask=pairs < last, other=0.0)
        features = tl.load(features_ptr + pairs, mask=pairs < last, other=0).to(tl.int64)
        gathered = features[:, None] * d_in + columns[None, :]
        w = tl.load(W_ptr + gathered, mask=(pairs < last)[:, None] & inside[None, :], other=0.0)
        sums += values[:, None] * w.to(tl.float32)
    out = tl.sum(sums, axis=0)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    if target_ptr is not None:
        out -= tl.load(target_ptr + row * d_in + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row * d_in + columns, out, mask=inside)
    if squares_ptr is not None:
        tl.store(squares_ptr + tile.to(tl.int64) * n_rows + row, tl.sum(out * out, axis=0))


@overload
def spmm(
    values: Tensor,
    features: Tensor,
    offsets: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    target: Tensor | None = None,
    squares: Literal[False] = False,
) -> Tensor: ...
@overload
def spmm(
    values: Tensor,
    features: Tensor,
    offsets: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    target: Tensor | None = None,
    *,
    squares: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def spmm(
    values: Float[Tensor, " nnz"],
    features: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
    W: Float[Tensor, "m d_in"],
    bias: Float[Tensor, " d_in"] | None = None,
    target: Float[Tensor, "batch d_in"] | None = None,
    squares: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`out[i] = sum over entries j of row i of values[j] * W[features[j]], + bias - target[i]`; `W` fp32 or bf16.

    With `squares` also returns each row's `|out[i]|^2 (batch)`: with a target, the squared error of the reconstruction.
    """
    n_rows, d_in = offsets.numel() - 1, W.shape[1]
    columns = _columns(W.shape[0], d_in, W.element_size())
    n_tiles = ceil_div(d_in, columns)
    out = torch.empty(n_rows, d_in, dtype=torch.float32, device=W.device)
    tile_squares = torch.empty(n_tiles, n_rows, dtype=torch.float32, device=W.device) if squares else None
    launch(
        _spmm_fwd_kernel,
        (n_rows, n_tiles),
        packed(values),
        packed(features),
        packed(offsets),
        packed(W),
        None if bias is None else packed(bias),
        None if target is None else packed(target),
        out,
        tile_squares,
        n_rows,
        d_in,
        PAIRS=_TILE // columns,
        COLUMNS=columns,
        num_warps=_WARPS,
    )
    return out if tile_squares is None else (out, sum_slices(tile_squares))


def spmm_residual(
    values: Float[Tensor, " nnz"],
    features: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
    W: Float[Tensor, "m d_in"],
    bias: Float[Tensor, " d_in"] | None,
    target: Float[Tensor, "batch d_in"],
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, ""]]:
    """`spmm + bias - target`, and its squared norm."""
    error, squares = spmm(values, features, offsets, W, bias, target, squares=True)
    return error, squares.sum()


def _columns(d_sae: int, d_in: int, element_size: int) -> int:
    """The widest tile, 32 to 256 columns, of which `d_sae` rows fit the cache. Independent of the batch, so the bits are too."""
    columns = 256
    while columns > 32 and (d_sae * columns * element_size > CACHE_BYTES or columns >= 2 * d_in):
        columns //= 2
    return columns
