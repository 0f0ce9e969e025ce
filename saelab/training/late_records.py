"""Numbers that a step leaves on a GPU, read some steps later: by then they have arrived, and nobody waits for them."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAG = 4
"""Steps that may be under way when a record is read."""


class Record(NamedTuple):
    """The record of one step."""

    step: int
    numbers: Tensor
    """On the host."""
    with_aux: bool


class LateRecords:
    """A queue of records on their way to the host."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Record, Any]] = deque()

    def push(self, step: int, numbers: Tensor, with_aux: bool) -> None:
        """Begin to copy the record of a step, whose memory the next step may overwrite."""
        arrived = None
        if numbers.is_cuda:
            here = torch.empty_like(numbers, device="cpu", pin_memory=True)
            here.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.current_stream(numbers.device).record_event()
        else:
            here = numbers.clone()
        self._waiting.append((Record(step, here, with_aux), arrived))

    def take(self, left: int) -> list[Record]:
        """The records but for the newest `left`, in order; waits for those that have not arrived."""
        taken = []
        while len(self._waiting) > left:
            taken.append(self.next())
        return taken

    def next(self) -> Record:
        """The oldest record; waits for it."""
        record, arrived = self._waiting.popleft()
        if arrived is not None:
            arrived.synchronize()
        return record

    def __len__(self) -> int:
        return len(self._waiting)
