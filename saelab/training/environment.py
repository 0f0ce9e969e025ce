"""Where a run computes: the conditions under which its bits are the same."""

from __future__ import annotations

import platform
import warnings
from typing import Any

import torch

from saelab.distributed.mesh import Mesh


def environment(device: torch.device, mesh: Mesh) -> dict[str, Any]:
    """What determines the bits of a run besides seed and data."""
    return {
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "backend": platform.machine(),
        "ranks": mesh.world.size if mesh.feature.size == 1 else f"{mesh.data.size} x {mesh.feature.size}",
    }


def warn_if_elsewhere(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn if a run resumes with a different torch, device, thread count or number of ranks: its bits may then differ."""
    before = {"ranks": 1} | before
    different = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if different:
        warnings.warn(
            f"This run resumes under different conditions ({', '.join(different)}): bits may differ.", stacklevel=5
        )
