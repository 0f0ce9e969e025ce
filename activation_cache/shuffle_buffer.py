"""The pool that shuffles: rows wait in fixed slots and are drawn at random, or in order. Knows no model, no file and no
storage."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

RowTensors = Mapping[str, Mapping[str, Tensor]]
"""Hook -> tensors that its rows are stored as (`storage.Storage.encode`), each (n, ...)."""


class ShuffleBuffer:
    """Rows waiting to be drawn: fixed buffers of slots, and the slots in use in the order in which their rows came."""

    def __init__(self, capacity: int):
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._index = torch.empty(capacity, 3, dtype=torch.int32)
        self._order = torch.empty(0, dtype=torch.int64)
        self._free = torch.arange(capacity)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def waiting(self) -> Int[Tensor, "n 3"]:
        """(seq, pos, token) of the rows in the pool, in the order in which they came."""
        return self._index[self._order]

    @property
    def oldest_context(self) -> int | None:
        """Sequence of the row that has waited longest."""
        return int(self._index[self._order[0], 0]) if len(self) else None

    def add(self, index: Int[Tensor, "n 3"], rows: RowTensors) -> None:
        """Put rows in, `index` being (seq, pos, token)."""
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
        """Take `n` rows out, at random and in random order; without a generator the first that came, in order."""
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
