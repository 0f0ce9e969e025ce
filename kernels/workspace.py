"""Buffers that are kept and used again: on a CPU a fresh large tensor costs more (page faults) than what is computed in it."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_CPU = torch.device("cpu")


class Workspace(threading.local):
    """One growing buffer a name and dtype, for each thread its own. What `take` gives is valid until the next `take` of
    that name, and never leaves the function that took it."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
        """An uninitialised tensor of that shape, at the front of the buffer (a fresh one on a GPU, which pools them)."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            self.buffers.pop((name, dtype), None)  # freed before the larger one is made
            with torch.inference_mode(False):  # a buffer made in inference mode could be used nowhere else
                buffer = self.buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


WORKSPACE = Workspace()
