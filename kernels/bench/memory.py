"""Measure the memory of a training step beyond the weights: `python -m saelab.kernels.bench.memory`, in a fresh process.

This is the peak resident memory of a few steps minus what is resident after the imports and minus the fp32 parameters, their
gradients and Adam's moments. Dense pre-activations alone would take `batch * d_sae * 4` bytes, and as much again for their
gradient.
"""

from __future__ import annotations

import json
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from saelab.kernels.bench.sparse_step import SparseTopK

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Sizes of the step, and the limit."""

    d_sae: int = 131072
    d_in: int = 576
    k: int = 32
    batch_size: int = 2048
    steps: int = 5
    limit_mib: float = 300.0
    """The exit status is 1 above this."""


def main(settings: Settings) -> int:
    """Print one JSON object; returns 1 above the limit, else 0."""
    before = _resident()
    step = SparseTopK(settings.d_in, settings.d_sae, settings.k)
    generator = torch.Generator().manual_seed(0)
    for _ in range(settings.steps):
        step.step(torch.randn(settings.batch_size, settings.d_in, generator=generator))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    numbers = sum(p.numel() for p in step.sae.parameters())
    held = numbers * 4 * 4  # parameters, gradients, two moments
    extra = (peak - before - held) / MIB
    result = {"d_sae": settings.d_sae, "peak_mib": round(peak / MIB), "held_mib": round(held / MIB)}
    dense = settings.batch_size * settings.d_sae * 4 / MIB
    print(
        json.dumps(result | {"extra_mib": round(extra, 1), "limit_mib": settings.limit_mib, "dense_mib": round(dense)})
    )
    return int(extra > settings.limit_mib)


def _resident() -> int:
    """Resident memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Settings, description=__doc__)))
