"""`KernelSpec`: one kernel at one production shape, as the compile report needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KernelSpec:
    """How to compile a kernel without a GPU, and how many bytes it moves when it runs."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, int]
    num_warps: int
    num_stages: int
    hbm_bytes: Callable[[int], int]
    """Modelled traffic of this kernel's launch order, given the usable bytes of the last-level cache."""
    least_bytes: Callable[[int], int]
    """The least traffic of any launch order at that cache size."""
    compulsory_bytes: int
    """Every operand and result once: what an endless cache would leave."""
    tile: tuple[int, int]
    tensor_cores: bool
