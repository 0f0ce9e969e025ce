"""Group maxima of a product: `maxima[row, group] = max over the group's features of (a @ b.T)[row, feature]`.

A tensor-core product whose epilogue keeps one fp32 number per row and group: `(rows, d_sae)` is never materialised.
Groups are strided (feature j belongs to group `j % n_groups`), so that similar neighbours fall into different groups.

Launch order: `a` is cut into super-blocks of rows that fit the last-level cache, with one launch each. Within a launch the
row block is the fastest grid axis, so concurrent programs share a few tiles of `b` and the whole super-block:
`a` is read from device memory once, `b` once per super-block, and 4 bytes are written per row and group.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.triton_backend import launch
from saelab.kernels.triton_backend.launch import Tile

# Tiles that compile without spills on each target, according to the compile report (docs/kernels.md).
TILES = {
    "sm_80": Tile(128, 128, 64, num_warps=8, num_stages=3),
    "sm_90": Tile(128, 256, 64, num_warps=8, num_stages=3),
    "sm_100": Tile(128, 256, 64, num_warps=8, num_stages=3),
    "gfx942": Tile(128, 128, 64, num_warps=8, num_stages=2),
    launch.SMALL_TILES: Tile(16, 32, 16, num_warps=1, num_stages=1),
}


@triton.jit
@no_type_check
def tile_product(
    a_rows,
    b_rows,
    a_mask,
    b_mask,
    K: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`(BLOCK_M, BLOCK_N)` fp32 inner products of the rows of length K at the pointers `a_rows` and `b_rows`."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_rows[:, None] + k[None, :], mask=a_mask[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_rows[None, :] + k[:, None], mask=b_mask[None, :] & (k < K)[:, None], other=0.0)
        if WIDEN:  # the interpreter would multiply the bit patterns of bf16 numbers
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
@no_type_check
def absolute(u):
    """`|u|`. Avoids `tl.abs`, with which Triton 3.6 returned zeros on an H100 after a product of 3 to 5 tiles along K."""
    return tl.maximum(u, -u)


@triton.jit
@no_type_check
def _group_max_fwd_kernel(
    a_ptr,
    b_ptr,
    maxima_ptr,
    rows,
    K: tl.constexpr,
    D_SAE: tl.constexpr,
    N_GROUPS: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCK_N: tl.constexpr = BLOCK_G * BLOCK_MEMBERS
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    first_group = tl.program_id(1) * BLOCK_G
    column = tl.arange(0, BLOCK_N)
    column_group = first_group + column // BLOCK_MEMBERS
    best = tl.full((BLOCK_M, BLOCK_G), float("-inf"), tl.float32)
    for first_member in range(0, (D_SAE + N_GROUPS - 1) // N_GROUPS, BLOCK_MEMBERS):
        member = first_member + column % BLOCK_MEMBERS
        feature = column_group.to(tl.int64) + member.to(tl.int64) * N_GROUPS
        present = (column_group < N_GROUPS) & (feature < D_SAE)
        u = tile_product(a_ptr + row * K, b_ptr + feature * K, row < rows, present, K, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K)
        if MAGNITUDE:
            u = absolute(u)
        u = tl.where(present[None, :], u, float("-inf"))
        best = tl.maximum(best, tl.max(tl.reshape(u, (BLOCK_M, BLOCK_G, BLOCK_MEMBERS)), axis=2))
    group = first_group + tl.arange(0, BLOCK_G)
    inside = (row < rows)[:, None] & (group < N_GROUPS)[None, :]
    tl.store(maxima_ptr + row[:, None] * N_GROUPS + group[None, :], best, mask=inside)


def constexprs(K: int, d_sae: int, n_groups: int, magnitude: bool, tile: Tile, itemsize: int) -> dict[str, int]:
    """The compile-time arguments: the shape of the model, but not the number of rows, which may differ from batch to batch."""
    members = launch.ceil_div(d_sae, n_groups)
    block_members = min(1 << (members - 1).bit_length(), 64, tile.columns)
    return {
        "K": K,
        "D_SAE": d_sae,
        "N_GROUPS": n_groups,
        "MAGNITUDE": magnitude,
        "WIDEN": launch.INTERPRETED,
        "BLOCK_M": tile.rows,
        "BLOCK_G": tile.columns // block_members,
        "BLOCK_MEMBERS": block_members,
        "BLOCK_K": tile.depth_of(itemsize),
    }


def group_max(
    a: Float[Tensor, "rows K"], b: Float[Tensor, "d_sae K"], n_groups: int, magnitude: bool = False
) -> Float[Tensor, "rows n_groups"]:
    """The fp32 maximum of `a @ b.T` (or of its absolute value) over each strided group; members beyond d_sae count as -inf.

    `a` and `b` are contiguous, both bf16 or both fp32.
    """
    rows, K = a.shape
    target = launch.target_of(a.device)
    tile = tile_of(target, a.element_size())
    arguments = constexprs(K, b.shape[0], n_groups, magnitude, tile, a.element_size())
    maxima = torch.empty((rows, n_groups), dtype=torch.float32, device=a.device)
    for part in launch.resident_parts(rows, K * a.element_size(), launch.usable_cache(target)):
        n_rows = part.stop - part.start
        grid = (launch.ceil_div(n_rows, tile.rows), launch.ceil_div(n_groups, arguments["BLOCK_G"]))
        launch.launch(_group_max_fwd_kernel, grid, a[part], b, maxima[part], n_rows, **arguments, **tile.options)
    return maxima


def tile_of(target: str, itemsize: int) -> Tile:
    """The tile for bf16 or fp32 operands; on NVIDIA GPUs exact fp32 products run outside the tensor cores and need registers."""
    return TILES["sm_80"] if itemsize == 4 and target.startswith("sm_") else TILES[target]
