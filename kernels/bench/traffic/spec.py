"""`KernelSpec`, a kernel at one shape for the compile report, and the shapes that the report uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from saelab.kernels.bench.sizes import Shape
from saelab.kernels.triton_backend.launch import CACHE_MIB, SMALL_TILES

TARGETS = tuple(name for name in CACHE_MIB if name != SMALL_TILES)
"""The targets of the compile report."""


@dataclass(frozen=True)
class KernelSpec:
    """One kernel at one shape, as the compile report compiles and judges it. Bytes are device-memory (HBM) traffic."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    hbm_bytes: Callable[[int], int]
    """Modelled traffic of our launch order, as a function of the usable cache in bytes."""
    least_bytes: Callable[[int], int]
    """Minimum over launch orders, as a function of the usable cache in bytes."""
    compulsory_bytes: int
    """Traffic with an unlimited cache: every operand and result once."""
    tile: tuple[int, int]
    tensor_cores: bool
    targets: tuple[str, ...] = TARGETS
    """The targets for which the tile of this spec is meant."""


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
    """(shape, target, dtype) of all screen kernels in the report; fp32 only at the largest shape."""
    cases = [(shape, "bf16") for shape in SCREEN_SHAPES] + [(SCREEN_SHAPES[0], "fp32")]
    return [(shape, target, dtype) for target in TARGETS for shape, dtype in cases]


ITEMSIZE = {"bf16": 2, "fp32": 4}


PRODUCTION = Shape(batch=8192, d_in=4096, d_sae=131072, k=64)
SMALL = Shape(batch=2048, d_in=576, d_sae=8192, k=32)


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
    """A `KernelSpec` without tensor cores; `types` are in the order of the arguments, without the constexprs.

    For a kernel that reads and writes everything once, whatever the cache, `compulsory_bytes` is enough.
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
        tile=(
            constexprs.get("PAIRS", constexprs.get("TILE", 1)),
            next(
                (constexprs[name] for name in ("COLUMNS", "TILE", "BLOCK", "SLOTS", "FEATURES") if name in constexprs),
                1,
            ),
        ),
        tensor_cores=False,
    )
