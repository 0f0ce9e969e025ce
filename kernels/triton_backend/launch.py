"""Shared by all Triton kernels here: targets, tiles, last-level cache sizes, and the only function that launches a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1, read when triton is imported)."""

SMALL_TILES = "interpreter"
"""The target with tiny tiles, so that test shapes span several tiles in the interpreter."""

CACHE_MIB = {"sm_80": 40, "sm_90": 50, "sm_100": 126, "gfx942": 256, SMALL_TILES: 1}
"""Last-level cache in MiB: L2 of A100, H100 and B200, Infinity Cache of MI300X."""

CACHE_SHARE = 0.8
"""Fraction of the cache that a launch order may rely on; the rest is left for streamed data."""

PART_BLOCK = 128
"""Super-blocks have a multiple of this many rows: whole row tiles on every target."""


@dataclass(frozen=True)
class Tile:
    """Output tile `rows x columns` of a product, its step `depth` along K for 2-byte operands, and its compile options."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Triton's compile options for a kernel with this tile."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def depth_of(self, itemsize: int) -> int:
        """The step along K for `itemsize` bytes per element, such that the shared memory used stays the same."""
        return self.depth * 2 // itemsize


def target_of(device: torch.device) -> str:
    """The target of a device, a key of `CACHE_MIB`. Raises `ValueError` for a CPU outside the interpreter, and below sm_80."""
    if device.type == "cpu":
        if not INTERPRETED:
            raise ValueError("Triton kernels take CPU tensors only in interpreter mode (TRITON_INTERPRET=1).")
        return SMALL_TILES
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"compute capability {major}.{minor} has no bf16 tensor cores; 8.0 or newer is needed")
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")  # consumer GPUs of every generation use the tiles of sm_80


def usable_cache(target: str) -> int:
    """Bytes of the last-level cache that a launch order may rely on."""
    return int(CACHE_MIB[target] * 2**20 * CACHE_SHARE)


def ceil_div(total: int, size: int) -> int:
    """`total / size`, rounded up."""
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
    """The tensor, contiguous and 16-byte aligned; not copied if it already is.

    Triton chooses the thread layout of a tile from the known strides and alignment, and the layout determines the order of
    a sum. With packed operands it depends on the shape only, so a row has the same bits wherever it is stored.
    """
    assert tensor.dtype != torch.float64, "the Triton kernels compute in fp32"
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constexprs: float) -> None:
    """Run `kernel` on the device of its first tensor, which need not be the current one; does nothing for an empty grid.

    All launches go through here: Triton itself uses the current device, and would run on GPU 0 with tensors of GPU 1.
    """
    if all(grid):
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, num_warps=num_warps, **constexprs)
