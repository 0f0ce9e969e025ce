"""What every Triton kernel of this folder shares: targets, tiles, the last-level cache, and the one place that launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Kernels run in numpy on CPU tensors (TRITON_INTERPRET=1, read when triton is imported)."""

SMALL_TILES = "interpreter"
"""The target whose tiles are tiny, so that the interpreter crosses tile borders at test shapes."""

CACHE_MIB = {"sm_80": 40, "sm_90": 50, "sm_100": 126, "gfx942": 256, SMALL_TILES: 1}
"""Last-level cache: L2 of A100, H100 and B200, Infinity Cache of MI300X."""

CACHE_SHARE = 0.8
"""Part of the cache that a launch order may count on; the rest holds what streams through."""

PART_BLOCK = 128
"""Super-blocks of rows are multiples of this: whole row tiles of every target."""


@dataclass(frozen=True)
class Tile:
    """Output tile `rows x columns` of a product, its step along K for 2-byte operands, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """How Triton compiles a kernel with this tile."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def depth_of(self, itemsize: int) -> int:
        """The step along K at `itemsize` bytes an element: always the same shared memory."""
        return self.depth * 2 // itemsize


def target_of(device: torch.device) -> str:
    """The name, among `CACHE_MIB`, of the target whose tiles fit a device."""
    if device.type == "cpu":
        if not INTERPRETED:
            raise ValueError("Triton kernels take CPU tensors only in interpreter mode (TRITON_INTERPRET=1).")
        return SMALL_TILES
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"compute capability {major}.{minor} has no bf16 tensor cores; 8.0 or newer is needed")
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")  # consumer chips of any year have sm_80's kind of memory


def usable_cache(target: str) -> int:
    """Bytes of the last-level cache that a launch order may count on."""
    return int(CACHE_MIB[target] * 2**20 * CACHE_SHARE)


def ceil_div(total: int, size: int) -> int:
    """How many pieces of `size` cover `total`."""
    return -(-total // size)


def resident_parts(rows: int, row_bytes: int, cache: int) -> list[slice]:
    """Split `rows` into as few super-blocks as fit the cache, of about equal size, in multiples of `PART_BLOCK` rows."""
    if rows == 0:
        return []
    fitting = max(1, cache // max(1, row_bytes * PART_BLOCK)) * PART_BLOCK
    share = ceil_div(rows, ceil_div(rows, fitting))
    step = ceil_div(share, PART_BLOCK) * PART_BLOCK
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def packed(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and 16-byte aligned; itself where it already is.

    Triton lays a tile out over threads by the strides and alignments it is promised, and the layout decides the order
    of a sum. Packed operands leave the shape alone to decide it: a row has the same bits wherever it came from.
    """
    assert tensor.dtype != torch.float64, "the Triton kernels compute in fp32"
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constexprs: int) -> None:
    """Run `kernel` on the device of its first tensor, which need not be the current one; an empty grid runs nothing.

    The only place that launches: Triton itself takes the current device, and would run on GPU 0 what lies on GPU 1.
    """
    if all(grid):
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, num_warps=num_warps, **constexprs)
