"""What every Triton kernel of this folder shares: targets, tiles, the last-level cache, and the form of a compile spec."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Kernels run in numpy on CPU tensors (TRITON_INTERPRET=1, read when triton is imported)."""

SMALL_TILES = "interpreter"
"""The target whose tiles are tiny, so that the interpreter crosses tile borders at test shapes."""

CACHE_MIB = {"sm_80": 40, "sm_90": 50, "sm_100": 126, "gfx942": 256, SMALL_TILES: 1}
"""Last-level cache: L2 of A100, H100 and B200, Infinity Cache of MI300X."""

TARGETS = tuple(name for name in CACHE_MIB if name != SMALL_TILES)
"""What the compile report compiles for."""

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


@dataclass(frozen=True)
class KernelSpec:
    """One kernel at one shape, as the compile report compiles and judges it. Bytes are of device memory (HBM)."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    hbm_bytes: Callable[[int], int]
    """Modelled traffic of our launch order, given the usable cache in bytes."""
    least_bytes: Callable[[int], int]
    """The least over launch orders, given the usable cache in bytes."""
    compulsory_bytes: int
    """Every operand and result once: what an unlimited cache would need."""
    tile: tuple[int, int]
    tensor_cores: bool
    targets: tuple[str, ...] = TARGETS
    """The targets that this spec's tile is made for."""


@dataclass(frozen=True)
class ScreenShape:
    """A shape at which the compile report judges the kernels of a `Screen`."""

    rows: int
    d_in: int
    d_sae: int
    n_groups: int
    k: int

    @property
    def K(self) -> int:
        """Length of the operands' rows: d_in and a few columns for bias and margin, padded to aligned loads."""
        return self.d_in + 16

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.d_in}x{self.d_sae}"


SCREEN_SHAPES = (ScreenShape(8192, 4096, 131072, 2048, 64), ScreenShape(2048, 576, 8192, 256, 32))


def screen_cases() -> list[tuple[ScreenShape, str, str]]:
    """(shape, target, dtype) of everything that the report compiles of a `Screen`: fp32 only at the largest shape."""
    cases = [(shape, "bf16") for shape in SCREEN_SHAPES] + [(SCREEN_SHAPES[0], "fp32")]
    return [(shape, target, dtype) for target in TARGETS for shape, dtype in cases]


ITEMSIZE = {"bf16": 2, "fp32": 4}


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


class Shape(NamedTuple):
    """A training step's sizes, for the compile report."""

    batch: int
    d_in: int
    d_sae: int
    k: int


PRODUCTION = Shape(batch=8192, d_in=4096, d_sae=131072, k=64)
SMALL = Shape(batch=2048, d_in=576, d_sae=8192, k=32)


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


def kernel_spec(
    name: str,
    fn: Any,
    types: str,
    constexprs: dict[str, int],
    num_warps: int,
    compulsory_bytes: int,
    hbm_bytes: Callable[[int], int] | None = None,
    least_bytes: Callable[[int], int] | None = None,
) -> KernelSpec:
    """A `KernelSpec` without tensor cores; `types` in the order of the arguments, before the constexprs.

    A kernel that reads and writes everything once, whatever the cache, gives its compulsory bytes alone.
    """
    run_time = [argument for argument in inspect.signature(fn.fn).parameters if argument not in constexprs]
    signature = dict(zip(run_time, types.split(), strict=True)) | dict.fromkeys(constexprs, "constexpr")
    return KernelSpec(
        name=name,
        fn=fn,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=2,
        hbm_bytes=hbm_bytes or (lambda cache: compulsory_bytes),
        least_bytes=least_bytes or (lambda cache: compulsory_bytes),
        compulsory_bytes=compulsory_bytes,
        tile=(constexprs.get("PAIRS", 1), constexprs.get("COLUMNS") or constexprs["BLOCK"]),
        tensor_cores=False,
    )
