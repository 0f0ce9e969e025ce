"""Batches of shuffled rows: threads gather them from mapped shards straight into place, each batch a task of its own.

The caller's thread decides the order of the rows and makes the tensors that the threads fill: its memory lies in large
pages (`allocator`), a thread's own would not. Small batches are made further ahead, as waking a thread takes a good part
of the time that one takes to fill. Shards are opened, and asked of the disk from front to back, `prefetch` shards before
their first row is due.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

_THREADS = 2
_AHEAD = 4, 12  # at least and at most so many batches are ready or being made
_AHEAD_BYTES = 1 << 26  # more than the least only while they fit here

Opened = Future[list[Tensor]]
"""The rows of a shard, `(n, d_in)` of each hook."""
Pieces = list[tuple[Opened, Int[Tensor, " _"]]]
"""Which rows of which shards make a batch."""


def shuffled_batches(
    plan: Iterator[tuple[int, Int[Tensor, " n"]]],
    open_shard: Callable[[int], list[Tensor]],
    widths: Sequence[int],
    batch_size: int,
    prefetch: int,
    dtype: torch.dtype,
) -> Generator[list[Shaped[Tensor, "batch d_in"]], None, None]:
    """Batches of each hook without end; `widths` are the d_in of each.

    `plan` gives shards and the rows to take of each, in order, also without end.
    """
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="saelab-cache-reader") as threads:
        pieces = _cut(_opened_ahead(threads, plan, open_shard, prefetch), batch_size)

        def next_batch() -> Future[list[Tensor]]:
            return threads.submit(
                _gather, next(pieces), [torch.empty(batch_size, d_in, dtype=dtype) for d_in in widths]
            )

        ahead = deque(next_batch() for _ in range(_n_ahead(batch_size * sum(widths) * dtype.itemsize)))
        try:
            while True:
                batch = ahead.popleft().result()
                ahead.append(next_batch())
                yield batch
        finally:  # also when the iterator is closed or forgotten
            threads.shutdown(wait=False, cancel_futures=True)


def _n_ahead(batch_bytes: int) -> int:
    minimum, maximum = _AHEAD
    return min(maximum, max(minimum, _AHEAD_BYTES // batch_bytes))


def _opened_ahead(
    threads: ThreadPoolExecutor,
    plan: Iterator[tuple[int, Tensor]],
    open_shard: Callable[[int], list[Tensor]],
    prefetch: int,
) -> Iterator[tuple[Opened, Tensor]]:
    """A shard is opened by a task that stands in the queue before those that wait for it."""
    ahead: deque[tuple[Opened, Tensor]] = deque()
    for shard, order in plan:
        ahead.append((threads.submit(open_shard, shard), order))
        if len(ahead) == prefetch:
            yield ahead.popleft()


def _cut(shards: Iterator[tuple[Opened, Tensor]], batch_size: int) -> Iterator[Pieces]:
    """Rows of whole batches, which run across the borders of shards."""
    pieces, missing = [], batch_size
    for opened, order in shards:
        while len(order) >= missing:
            yield [*pieces, (opened, order[:missing])]
            order, pieces, missing = order[missing:], [], batch_size
        if len(order):
            pieces.append((opened, order))
            missing -= len(order)


def _gather(pieces: Pieces, batch: list[Tensor]) -> list[Tensor]:
    """Fill a batch of each hook."""
    start = 0
    for opened, order in pieces:
        for rows, out in zip(opened.result(), batch, strict=True):
            unit = out[start : start + len(order)]
            if rows.dtype == out.dtype:
                torch.index_select(rows, 0, order, out=unit)
            else:
                unit.copy_(rows.index_select(0, order))
        start += len(order)
    return batch
