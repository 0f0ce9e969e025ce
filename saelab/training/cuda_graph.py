"""Record the launches of a step once and replay them: the host then needs microseconds a step, whatever the step launches."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

VARIABLE = "SAELAB_GRAPHS"
_EAGER = 2
"""Steps that run as they are before one is recorded: kernels are compiled and libraries set up in these."""


class Replayed:
    """Calls `run` the first times, then replays it. `run` takes no argument, returns nothing and never waits for the GPU."""

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self._run, self._device = run, device
        self._left = _EAGER if device.type == "cuda" and wanted() else -1
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._left == 0 and self._graph is None:
            self._graph = self._recorded()
        if self._graph is not None:
            self._graph.replay()
            return
        self._run()
        self._left -= self._left > 0

    def renew(self) -> None:
        """Record anew, as what it launches has changed; waits for what runs."""
        if self._graph is not None:
            torch.cuda.synchronize(self._device)
            self._graph = None
        self._left = _EAGER if self._left >= 0 else -1

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Threads that read the cache may meanwhile use the GPU: that is no error of the recording.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run()
        return graph


def wanted() -> bool:
    """Whether `SAELAB_GRAPHS` allows recording. Raises `ValueError` for a value other than 0 and 1."""
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={value!r} must be 1 (record training steps as CUDA graphs, the default) or 0.")
    return value == "1"
