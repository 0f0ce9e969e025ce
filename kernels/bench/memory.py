"""How much memory does a step need beyond the weights? `python -m saelab.kernels.bench.memory`, in a fresh process.

Peak resident memory of five steps, less the bytes of the fp32 parameters, their gradients and Adam's moments, above what
is resident after the imports. Dense pre-activations alone would be `batch * d_sae * 4` bytes, once each way.
"""

from __future__ import annotations

import json
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from saelab.kernels.bench.bench_step import SparseTopK

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """The step that is measured."""

    d_sae: int = 131072
    d_in: int = 576
    k: int = 32
    batch_size: int = 2048
    steps: int = 5
    limit_mib: float = 300.0
    """More than this gives exit status 1."""


def main(settings: Settings) -> int:
    """Print one JSON object; gives 1 above the limit."""
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
    """Bytes resident now."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Settings, description=__doc__)))
