"""Recompute chosen (row, group) pairs of a product, to find which members of the group reach the row's floor.

A grouped GEMM, as in a mixture of experts: the pairs are sorted by group, and a tile multiplies up to BLOCK_M rows of one
group, gathered by id, with the members of the group. The kernel writes one bit per score instead of the scores: bit i of
word w of a pair represents member `32 w + i`.

Launch order: the caller passes the pairs of one super-block of rows, which stays in the last-level cache and is gathered
from there. Within a launch the groups are processed in order, so that `b` is read from device memory once per super-block,
however many tiles a group has.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend import launch
from saelab.kernels.triton_backend.group_max import absolute, tile_product
from saelab.kernels.triton_backend.launch import Tile

# About 100 rows of a super-block belong to each group: small tiles waste few of their rows.
TILES = {
    "sm_80": Tile(64, 64, 64, num_warps=4, num_stages=3),
    "sm_90": Tile(64, 64, 64, num_warps=4, num_stages=4),
    "sm_100": Tile(64, 64, 64, num_warps=4, num_stages=4),
    "gfx942": Tile(64, 64, 64, num_warps=4, num_stages=2),
    launch.SMALL_TILES: Tile(16, 32, 16, num_warps=1, num_stages=1),
}


@triton.jit
@no_type_check
def _grouped_product_fwd_kernel(
    a_ptr,
    b_ptr,
    floor_ptr,
    pair_rows_ptr,
    tile_groups_ptr,
    tile_starts_ptr,
    tile_ends_ptr,
    masks_ptr,
    K: tl.constexpr,
    D_SAE: tl.constexpr,
    N_GROUPS: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    WORDS: tl.constexpr = ((D_SAE + N_GROUPS - 1) // N_GROUPS + 31) // 32
    BLOCK_W: tl.constexpr = BLOCK_N // 32
    tile = tl.program_id(0)
    group = tl.load(tile_groups_ptr + tile).to(tl.int64)
    pair = tl.load(tile_starts_ptr + tile).to(tl.int64) + tl.arange(0, BLOCK_M)
    taken = pair < tl.load(tile_ends_ptr + tile)
    row = tl.load(pair_rows_ptr + pair, mask=taken, other=0).to(tl.int64)
    floor = tl.load(floor_ptr + row, mask=taken, other=float("inf"))
    feature = group + (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64) * N_GROUPS
    present = feature < D_SAE
    u = tile_product(a_ptr + row * K, b_ptr + feature * K, taken, present, K, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K)
    if MAGNITUDE:
        u = absolute(u)
    hit = ((u >= floor[:, None]) & present[None, :]).to(tl.int32)
    bit = hit << (tl.arange(0, BLOCK_N) % 32)[None, :]
    words = tl.sum(
        tl.reshape(bit, (BLOCK_M, BLOCK_W, 32)), axis=2
    )  # the bits are distinct, so their sum is their bitwise or
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    tl.store(masks_ptr + pair[:, None] * WORDS + word[None, :], words, mask=taken[:, None] & (word < WORDS)[None, :])


def grouped_product(
    a: Float[Tensor, "rows K"],
    b: Float[Tensor, "d_sae K"],
    floor: Float[Tensor, " rows"],
    pair_groups: Int[Tensor, " n_pairs"],
    pair_rows: Int[Tensor, " n_pairs"],
    n_groups: int,
    magnitude: bool = False,
) -> Int[Tensor, "n_pairs words"]:
    """32-bit hit masks of (row, group) pairs, sorted by group: bit i of word w is `u >= floor[row]` for member 32 w + i.

    `u` is `a @ b.T` (or its absolute value); member m of a group is feature `group + m * n_groups`. Operands as in
    `group_max`; members that do not exist never hit.
    """
    n_pairs, K = pair_rows.numel(), a.shape[1]
    members = launch.ceil_div(b.shape[0], n_groups)
    masks = torch.empty((n_pairs, launch.ceil_div(members, 32)), dtype=torch.int32, device=a.device)
    if n_pairs == 0:
        return masks
    tile = TILES[launch.target_of(a.device)]
    groups, starts, ends = _tiles_of(pair_groups, n_groups, tile.rows)
    arguments = constexprs(K, b.shape[0], n_groups, magnitude, tile, a.element_size())
    launch.launch(
        _grouped_product_fwd_kernel,
        (groups.numel(), launch.ceil_div(members, tile.columns)),
        a,
        b,
        floor,
        pair_rows.int(),
        groups,
        starts,
        ends,
        masks,
        **arguments,
        **tile.options,
    )
    return masks


def _tiles_of(pair_groups: Tensor, n_groups: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each group's run of pairs into tiles of at most `block`; group, first pair and end of each tile, int32."""
    ends = torch.searchsorted(pair_groups, torch.arange(n_groups, device=pair_groups.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    tiles = (counts + block - 1) // block
    groups = torch.repeat_interleave(tiles)
    nth = torch.arange(groups.numel(), device=groups.device) - (tiles.cumsum(0) - tiles)[groups]
    return groups.int(), ((ends - counts)[groups] + nth * block).int(), ends[groups].int()


def constexprs(K: int, d_sae: int, n_groups: int, magnitude: bool, tile: Tile, itemsize: int) -> dict[str, int]:
    """The compile-time arguments: the shape of the model, but not the number of rows or pairs."""
    return {
        "K": K,
        "D_SAE": d_sae,
        "N_GROUPS": n_groups,
        "MAGNITUDE": magnitude,
        "WIDEN": launch.INTERPRETED,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth_of(itemsize),
    }
