"""Training rows on a GPU before the step that reads them: two batches ahead, by asynchronous copies from pinned memory.

The copies run on a stream of their own, so neither the host nor the GPU's compute stream waits for them, unless a step reaches
its rows before they have arrived. Rows are copied in the dtype they come in (half the bytes from a bfloat16 cache); `normalize`
widens them on the GPU.

Pinned blocks come from torch's pinned allocator, which reuses the block of a freed tensor only after the copies that read it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saelab.training.data_source import Rows

AHEAD = 2
"""Batches on their way to the GPU, or there, besides the one in use."""
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class StagedRows(Mapping[str, Tensor]):
    """The rows of a batch, on the CPU as in any other batch, and their copies on a GPU."""

    rows: Rows
    device: torch.device
    copies: Rows
    """On `device`, by hook name; those of rows that were not on the CPU are missing."""
    receive: Callable[[Tensor], None]
    """Called with a copy before each use: later work on the current stream waits for it."""

    def __getitem__(self, name: str) -> Tensor:
        return self.rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def on_device(self, name: str, rows: slice) -> Tensor:
        """These rows of a hook, for use on the current stream."""
        if name not in self.copies:
            return self.rows[name][rows].to(self.device)
        self.receive(self.copies[name])
        return self.copies[name][rows]


def device_rows(batch: Rows, name: str, rows: slice, device: torch.device) -> Tensor:
    """These rows of a hook on `device`: already there if they were staged for it, otherwise copied now."""
    if isinstance(batch, StagedRows) and batch.device == device:
        return batch.on_device(name, rows)
    return batch[name][rows].to(device)


def common_device(devices: Iterable[torch.device]) -> torch.device:
    """The device that all of these are; the CPU if they differ, from which rows are then copied step by step."""
    different = set(devices)
    return different.pop() if len(different) == 1 else _CPU


def ahead_on(device: torch.device, batches: Iterator[Rows], pinned: bool = False) -> Iterator[Rows]:
    """The same batches, staged two ahead on a CUDA `device`; for any other device `batches` itself.

    `pinned`: the batches are in pinned memory that nobody writes to again, so they need no pinned copy.
    """
    return read_ahead(batches, _Copying(device, pinned)) if device.type == "cuda" else batches


def read_ahead(batches: Iterator[Rows], stage: Callable[[Rows], Rows]) -> Generator[Rows, None, None]:
    """Each batch as `stage` returns it, called two batches ahead.

    An error of `batches` is raised in place of the batch that it prevented, after those before it. A batch that `stage` returns
    unchanged is handed out before the next one is read, since its memory may be reused for that.
    """
    staged: deque[Rows] = deque()
    error: Exception | None = None
    try:
        while error is None:
            try:
                rows = next(batches)
            except StopIteration:
                break
            except Exception as raised:
                error = raised
                break
            staged.append(stage(rows))
            most = 0 if staged[-1] is rows else AHEAD
            while len(staged) > most:
                yield staged.popleft()
        while staged:
            yield staged.popleft()
        if error is not None:
            raise error
    finally:  # also when this iterator is closed or garbage-collected
        close: Any = getattr(batches, "close", None)
        if close is not None:
            close()


class _Copying:
    """Starts copying a batch to a CUDA device, on a stream of its own."""

    def __init__(self, device: torch.device, pinned: bool):
        self.device, self.pinned = device, pinned
        self.stream = torch.cuda.Stream(device)

    def __call__(self, rows: Rows) -> Rows:
        here = {name: x for name, x in rows.items() if x.device.type == "cpu"}
        if not here:
            return rows
        if not self.pinned:
            here = {name: torch.empty_like(x, pin_memory=True).copy_(x) for name, x in here.items()}
        with torch.cuda.stream(self.stream):
            copies = {name: x.to(self.device, non_blocking=True) for name, x in here.items()}
            arrived = self.stream.record_event()

        def receive(copy: Tensor) -> None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            copy.record_stream(current)  # its memory is not reused before this stream is done with it

        return StagedRows({**rows, **here}, self.device, copies, receive)
