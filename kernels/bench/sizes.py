"""Sizes of a TopK training step: `Shape`, and the sizes that `bench_step` runs on a CPU and on a GPU."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of a training step."""

    batch: int
    d_in: int
    d_sae: int
    k: int

    @property
    def label(self) -> str:
        """The `shape` column of a row."""
        return "x".join(map(str, self))


CPU_D_SAE = (4096, 8192, 16384, 32768, 65536, 131072)
"""Dictionary sizes on a CPU; batch, d_in and k are options."""

GPU_SIZES = (
    Shape(2048, 576, 8192, 32),
    Shape(2048, 576, 32768, 32),
    Shape(2048, 576, 131072, 32),
    Shape(4096, 768, 24576, 32),
    Shape(4096, 768, 32768, 64),
    Shape(4096, 2304, 16384, 64),
    Shape(4096, 2304, 65536, 64),
    Shape(8192, 2048, 32768, 64),
    Shape(8192, 4096, 16384, 64),
    Shape(8192, 4096, 65536, 64),
    Shape(8192, 4096, 131072, 64),
    Shape(16384, 4096, 8192, 128),
)
"""From SmolLM2-135M to the residual stream of an 8B model, and one size at which dense products are less work."""
