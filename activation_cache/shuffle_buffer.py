"""The shuffle buffer: rows wait in fixed slots and are drawn at random, or in order. Independent of model, files and
storage."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

RowTensors = Mapping[str, Mapping[str, Tensor]]
"""Hook -> tensors that its rows are stored as (`codec.Storage.encode`), each (n, ...)."""


class ShuffleBuffer:
    """Rows waiting to be drawn: fixed buffers of slots, and the slots in use, in order of arrival."""

    def __init__(self, capacity: int):
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._index = torch.empty(capacity, 3, dtype=torch.int32)
        self._order = torch.empty(0, dtype=torch.int64)
        self._free = torch.arange(capacity)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def waiting(self) -> Int[Tensor, "n 3"]:
        """(seq, pos, token) of the rows in the buffer, in order of arrival."""
        return self._index[self._order]

    @property
    def oldest_context(self) -> int | None:
        """Context number of the row that has waited longest; None if the buffer is empty."""
        return int(self._index[self._order[0], 0]) if len(self) else None

    def add(self, index: Int[Tensor, "n 3"], rows: RowTensors) -> None:
        """Add rows; `index` is their (seq, pos, token)."""
        slots, self._free = self._free[: len(index)], self._free[len(index) :]
        self._index[slots] = index
        for hook, tensors in rows.items():
            buffers = self._buffers.setdefault(hook, {})
            for name, x in tensors.items():
                if name not in buffers:
                    buffers[name] = torch.empty(len(self._index), *x.shape[1:], dtype=x.dtype)
                buffers[name].index_copy_(0, slots, x)
        self._order = torch.cat([self._order, slots])

    def draw(
        self, n: int, generator: torch.Generator | None
    ) -> tuple[Int[Tensor, "n 3"], dict[str, dict[str, Tensor]]]:
        """Remove `n` rows, at random and in random order; without a generator the oldest, in order of arrival."""
        picks = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        picks = picks[:n]
        slots = self._order[picks]
        stays = torch.ones(len(self), dtype=torch.bool)
        stays[picks] = False
        self._order = self._order[stays]
        self._free = torch.cat([self._free, slots])
        drawn = {
            hook: {name: x.index_select(0, slots) for name, x in buffers.items()}
            for hook, buffers in self._buffers.items()
        }
        return self._index[slots], drawn
