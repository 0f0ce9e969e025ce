"""Estimates the memory of a run before anything is allocated: one that does not fit is refused rather than killed midway.

Weights, gradients and Adam's moments are exact but for the biases. Batches and workspace are estimated from the sizes of a
step's tensors; tests compare them with real steps. A fraction `DEAD` of the features is taken to be dead, as the aux loss
is dense in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from saelab.activation_cache.layout import human_bytes
from saelab.errors import TrainingError
from saelab.kernels.dispatch import fast_bf16
from saelab.saes import SAE, MatchingPursuitConfig
from saelab.saes.cross_layer import CrossLayer
from saelab.training.config import TrainConfig
from saelab.training.data_source import View

Plan = Mapping[str, Mapping[str, int]]
"""Bytes by device and purpose."""

DEAD = 0.05
_ACTIVE_BYTES = 120  # ids, values, their sorted copies and gradients, of one feature that fires on one token
_ROW_COPIES = 8  # of a step's input and output
_AUX_COPIES = 7  # of the dense pre-activations of dead features
_WEIGHT_COPIES = 3  # of what feature activations are weighted by
_SCREEN_BYTES = 36 << 20  # kernels/torch_backend/screen.py
_BATCHES = 6  # read ahead, and the one in use


def plan_memory(variant: type[SAE], config: Any, view: View, train: TrainConfig, device: torch.device) -> Plan:
    """Bytes that training one SAE needs in addition to what is in use; with sharded features, those of one shard."""
    d_sae = -(-config.d_sae // train.feature_shards)
    width, width_out = view.width, view.width_out
    matrices = [d_sae * width_out * 4] + ([] if variant.tied else [d_sae * width * 4])
    if issubclass(variant, CrossLayer):  # features read one layer each, and write to (n_sources + 1) / 2 on average
        n_sources = view.shape["n_sources"]
        matrices = [matrices[0] * (n_sources + 1) // (2 * n_sources), d_sae * view.d_in * 4]
    weights = sum(matrices)
    n_rows = -(-train.batch_size // train.grad_accumulation)
    screen = min(_SCREEN_BYTES, n_rows * d_sae * 4)
    rounded = d_sae * width * 2 if fast_bf16(device) else 0
    again = max(matrices) if train.grad_accumulation > 1 or variant.tied else 0  # accumulated gradients
    step = {
        "weights": weights,
        "gradients": weights,
        "Adam": 2 * weights,
        "batches": _BATCHES * train.batch_size * max(width, width_out) * 4 * (2 if variant.needs_gradients else 1),
        "snapshot": weights if train.snapshot_every else 0,
        "workspace": screen + rounded + again + _step_bytes(variant, config, n_rows, width, weights),
    }
    if device.type == "cpu":
        return {"cpu": step}
    pinned = 2 if device.type == "cuda" else 1  # blocks of pinned memory are powers of two
    return {str(device): step, "cpu": {"batches": pinned * step["batches"], "checkpoint": 3 * weights}}


def _step_bytes(variant: type[SAE], config: Any, n_rows: int, width: int, weights: int) -> int:
    """Bytes of the tensors that live as long as a step of `n_rows` tokens."""
    steps = config.k if isinstance(config, MatchingPursuitConfig) else 0  # each step of a pursuit keeps its residual
    total = n_rows * width * 4 * (_ROW_COPIES + 4 * steps) + n_rows * variant.peak_l0(config) * _ACTIVE_BYTES
    if variant.has_dense_aux(config):
        total += DEAD * (_AUX_COPIES * 4 * n_rows * config.d_sae + 3 * weights)
    if variant.needs_gradients:
        total += _WEIGHT_COPIES * 4 * n_rows * config.d_sae
    return int(total)


def check_memory(plans: Iterable[Plan], free: Mapping[str, int]) -> str:
    """One line per device: the sum of the plans, its parts, and what is `free` there (bytes by device).

    Raises `TrainingError` if the sum does not fit. Devices missing in `free` are not checked.
    """
    total: dict[str, Counter[str]] = {}
    for plan in plans:
        for device, uses in plan.items():
            total.setdefault(device, Counter()).update(uses)
    lines = []
    for device, uses in total.items():
        needed = sum(uses.values())
        each = ", ".join(f"{name} {human_bytes(n)}" for name, n in uses.items() if n)
        have = f" of {human_bytes(free[device])} free" if device in free else ""
        lines.append(f"Memory on {device}: about {human_bytes(needed)}{have} ({each}).")
        if needed > free.get(device, needed):
            raise TrainingError(
                f"This training does not fit. {lines[-1]} Lower d_sae or batch_size, or raise grad_accumulation (for a "
                "smaller workspace), train fewer SAEs side by side, or shard the features over ranks (feature_shards)."
            )
    return "\n".join(lines)


def free_bytes(device: torch.device, root: Path = Path("/")) -> dict[str, int]:
    """Bytes available on the CPU, within the limit of its cgroup, and on a GPU; devices of unknown memory are left out."""
    known = [_available(root), _left_in_cgroup(root)]
    free = {"cpu": min(n for n in known if n is not None)} if known != [None, None] else {}
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # torch's cache, which it reuses
        free[str(device)] = torch.cuda.mem_get_info(device)[0] + kept
    return free


def _available(root: Path) -> int | None:
    found = _fields(root / "proc/meminfo").get("MemAvailable:")
    return None if found is None else found * 1024


def _left_in_cgroup(root: Path) -> int | None:
    """Limit minus usage of the process's cgroup (version 2 or 1); cached files do not count, as they can be evicted."""
    left: list[int] = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        for folder in {base / path.lstrip("/"), base}:  # a container may see its own as the root
            limit, used = (_lines(folder / name) for name in names[:2])
            if limit and used and limit[0].isdigit():  # "max" means no limit
                cached = _fields(folder / "memory.stat").get(names[2], 0)
                left.append(max(0, int(limit[0]) - int(used[0]) + cached))
    return min(left, default=None)


def _fields(path: Path) -> dict[str, int]:
    """The second word of each line, a number, by the first."""
    words = (line.split() for line in _lines(path))
    return {some[0]: int(some[1]) for some in words if len(some) > 1 and some[1].isdigit()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
