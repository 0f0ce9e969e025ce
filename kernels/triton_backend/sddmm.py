"""`sddmm` in Triton: `<x[row], W[feature]>` at chosen pairs, each summed in the same fixed order.

Launch order: d_in is cut into tiles of 256 columns, the slowest grid axis, and within a tile the pairs are processed by
feature. So a tile of `x` (8 MB at batch 8192) stays in the cache while `W` streams through once; gathered row by row, a
large `W` would be read k * batch / d_sae times. Each tile writes one partial sum per pair, and a second kernel adds them.
The arithmetic of a pair is independent of the others: its value has the same bits alone, in a batch and at any position.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.launch import ceil_div, launch, packed

CACHE_BYTES = 24 << 20
"""Bytes that can be relied on to stay in the last-level cache: the smallest target's 40 MB minus streamed data."""
_PAIRS = 16
_COLUMNS = 256
_SUM_BLOCK = 1024
_WARPS = 4


@triton.jit(do_not_specialize=["nnz"])
@no_type_check
def _sddmm_fwd_kernel(
    x_ptr,
    W_ptr,
    rows_ptr,
    features_ptr,
    partials_ptr,
    nnz,
    d_in,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(1)
    pairs = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    real = pairs < nnz
    inside = real[:, None] & (columns < d_in)[None, :]
    rows = tl.load(rows_ptr + pairs, mask=real, other=0).to(tl.int64)
    features = tl.load(features_ptr + pairs, mask=real, other=0).to(tl.int64)
    x = tl.load(x_ptr + rows[:, None] * d_in + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(W_ptr + features[:, None] * d_in + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(partials_ptr + tile.to(tl.int64) * nnz + pairs, tl.sum(x * w, axis=1), mask=real)


@triton.jit(do_not_specialize=["n", "n_slices"])
@no_type_check
def _sum_slices_kernel(slices_ptr, positions_ptr, out_ptr, n, n_slices, BLOCK: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(n_slices):
        total += tl.load(slices_ptr + columns, mask=inside, other=0.0)
        slices_ptr += n
    positions = columns
    if positions_ptr is not None:
        positions = tl.load(positions_ptr + columns, mask=inside, other=0)
    tl.store(out_ptr + positions, total, mask=inside)


def sddmm(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "m d_in"],
    features: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
) -> Float[Tensor, " nnz"]:
    """`values[j] = <x[row of j], W[features[j]]>` in fp32; operands fp32 or bf16. No gradient."""
    nnz, d_in = features.numel(), W.shape[1]
    ids = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    rows = torch.repeat_interleave(ids, offsets.diff(), output_size=nnz)
    features, positions = packed(features.to(torch.int32)), None
    if min(nnz, W.shape[0]) * _COLUMNS * W.element_size() > CACHE_BYTES:  # a tile of W would not stay in the cache
        features, positions = features.sort(stable=True)
        rows = rows[positions]
    n_tiles = ceil_div(d_in, _COLUMNS)
    partials = torch.empty(n_tiles, nnz, dtype=torch.float32, device=x.device)
    launch(
        _sddmm_fwd_kernel,
        (ceil_div(nnz, _PAIRS), n_tiles),
        packed(x),
        packed(W),
        rows,
        features,
        partials,
        nnz,
        d_in,
        PAIRS=_PAIRS,
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
    )
    return sum_slices(partials, positions)


def sum_slices(slices: Float[Tensor, "n_slices n"], positions: Int[Tensor, " n"] | None = None) -> Float[Tensor, " n"]:
    """`out[positions[j]] = slices[0, j] + slices[1, j] + ...`, from the first slice to the last; `positions` is a permutation."""
    n_slices, n = slices.shape
    out = torch.empty(n, dtype=torch.float32, device=slices.device)
    launch(
        _sum_slices_kernel,
        (ceil_div(n, _SUM_BLOCK),),
        slices,
        positions,
        out,
        n,
        n_slices,
        BLOCK=_SUM_BLOCK,
        num_warps=_WARPS,
    )
    return out
