"""What a step does on a GPU beside taking time: kernels started, waits of the host, peak memory. Nothing on a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMemcpy2D")
"""Calls of the CUDA runtime that return only when the GPU has finished."""
STEPS = 2
"""Profiled steps."""
_CPU = torch.autograd.DeviceType.CPU  # pyright: ignore[reportPrivateImportUsage]


class Counts(NamedTuple):
    """Kernels and waits of a trace."""

    launches: int
    waits: int


def count(events: Iterable[Any]) -> Counts:
    """Count the kernels, without copies and fills, and the waits among the events of a profiler."""
    launches = waits = 0
    for event in events:
        if event.device_type == _CPU:
            waits += event.name in WAITS
        elif not getattr(event, "is_user_annotation", False) and not event.name.startswith(("Memcpy", "Memset")):
            launches += 1
    return Counts(launches, waits)


def trace(step: Callable[[], Any], device: str, held: int) -> dict[str, float]:
    """The columns `launches`, `waits` and `peak_mib` of a step that has been run before; empty on a CPU.

    `held` is what `allocated` returned before the step's model was built.
    """
    if torch.device(device).type != "cuda":
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    empty, full = _empty_trace(), _counts(step, STEPS)
    launches, waits = ((b - a) / STEPS for a, b in zip(empty, full, strict=True))
    return {"launches": launches, "waits": waits, "peak_mib": round(peak / 2**20)}


@cache
def _empty_trace() -> Counts:
    """Counts of a trace without a step: the profiler waits too. The first trace of a process starts it up and is discarded."""
    return [_counts(lambda: None, 0) for _ in range(2)][-1]


def _counts(step: Callable[[], Any], n: int) -> Counts:
    """Counts of a trace of `n` steps."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(n):
            step()
        torch.cuda.synchronize()
    return count(profiler.events() or ())


def allocated(device: str) -> int:
    """Bytes of tensors on the GPU, after freeing what nothing refers to; 0 on a CPU."""
    if torch.device(device).type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()
