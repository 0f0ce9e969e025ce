"""Prefetching of shuffled batches: threads gather rows from memory-mapped shards into preallocated tensors, one task per batch.

The calling thread decides the order of the rows and allocates the tensors that the threads fill: its memory is in large
pages (`allocator`); a worker thread's would not be. Small batches are prepared further ahead, because waking a thread takes
a sizeable part of the time needed to fill one. Shards are opened (the first time, read sequentially for their SHA-256)
`prefetch` shards before their first row is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

_THREADS = 2
_AHEAD = 4, 12  # minimum and maximum number of batches ready or in progress
_AHEAD_BYTES = 1 << 26  # more than the minimum only while they fit in this

Opened = Future[list[Tensor]]
"""The rows of a shard, `(n, d_in)` per hook."""
Pieces = list[tuple[Opened, Int[Tensor, " _"]]]
"""Which rows of which shards make up a batch."""


def shuffled_batches(
    plan: Iterator[tuple[int, Int[Tensor, " n"]]],
    open_shard: Callable[[int], list[Tensor]],
    widths: Sequence[int],
    batch_size: int,
    prefetch: int,
    dtype: torch.dtype,
    pin_memory: bool = False,
) -> Generator[list[Shaped[Tensor, "batch d_in"]], None, None]:
    """Endless batches, one tensor per hook, each in memory of its own; `widths` are the hooks' d_in.

    `plan` yields shards and the rows to take from each, in order, also endlessly.
    """
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="saelab-cache-reader") as threads:
        pieces = _cut(_opened_ahead(threads, plan, open_shard, prefetch), batch_size)

        def next_batch() -> Future[list[Tensor]]:
            empty = [torch.empty(batch_size, d_in, dtype=dtype, pin_memory=pin_memory) for d_in in widths]
            return threads.submit(_gather, next(pieces), empty)

        ahead = deque(next_batch() for _ in range(_n_ahead(batch_size * sum(widths) * dtype.itemsize)))
        try:
            while True:
                batch = ahead.popleft().result()
                ahead.append(next_batch())
                yield batch
        finally:  # also when the iterator is closed or garbage-collected
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
    """Each shard is opened by a task queued before those that wait for it."""
    ahead: deque[tuple[Opened, Tensor]] = deque()
    for shard, order in plan:
        ahead.append((threads.submit(open_shard, shard), order))
        if len(ahead) == prefetch:
            yield ahead.popleft()


def _cut(shards: Iterator[tuple[Opened, Tensor]], batch_size: int) -> Iterator[Pieces]:
    """The rows of whole batches, which may span shards."""
    pieces, missing = [], batch_size
    for opened, order in shards:
        while len(order) >= missing:
            yield [*pieces, (opened, order[:missing])]
            order, pieces, missing = order[missing:], [], batch_size
        if len(order):
            pieces.append((opened, order))
            missing -= len(order)


def _gather(pieces: Pieces, batch: list[Tensor]) -> list[Tensor]:
    """Fill one batch per hook."""
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
