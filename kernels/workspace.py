"""Reusable buffers: on a CPU the page faults of a fresh large tensor cost more than what is computed in it."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_CPU = torch.device("cpu")


class Workspace(threading.local):
    """One growing buffer per name, dtype and thread. A tensor from `take` is valid until the next `take` of the same name,
    and must not be returned by the function that took it."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
        """An uninitialised tensor of that shape: a view of the buffer, or a fresh tensor on a GPU, where torch caches blocks."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            self.buffers.pop((name, dtype), None)  # freed before the larger one is allocated
            with torch.inference_mode(False):  # a buffer made in inference mode could not be used outside it
                buffer = self.buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


WORKSPACE = Workspace()
