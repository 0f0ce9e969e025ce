"""Batches of shuffled rows: threads gather them from mapped shards straight into place, each batch a task of its own.

Only the order of the rows is decided in the caller's thread. Shards are opened, and asked of the disk from front to back,
`prefetch` shards before their first row is due.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

_THREADS = 2
_AHEAD = 4  # batches that are ready or being made

Opened = Future[list[Tensor]]
"""The rows of a shard, `(n, d_in)` of each hook."""
Pieces = list[tuple[Opened, Int[Tensor, " _"]]]
"""Which rows of which shards make a batch."""


def shuffled_batches(
    plan: Iterator[tuple[int, Int[Tensor, " n"]]],
    open_shard: Callable[[int], list[Tensor]],
    batch_size: int,
    prefetch: int,
    dtype: torch.dtype,
) -> Generator[list[Shaped[Tensor, "batch d_in"]], None, None]:
    """Batches of each hook without end. `plan` gives shards and the rows to take of each, in order, also without end."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="saelab-cache-reader") as threads:
        pieces = _cut(_opened_ahead(threads, plan, open_shard, prefetch), batch_size)
        ahead = deque(threads.submit(_gathered, next(pieces), dtype) for _ in range(_AHEAD))
        try:
            while True:
                batch = ahead.popleft().result()
                ahead.append(threads.submit(_gathered, next(pieces), dtype))
                yield batch
        finally:  # also when the iterator is closed or forgotten
            threads.shutdown(wait=False, cancel_futures=True)


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


def _gathered(pieces: Pieces, dtype: torch.dtype) -> list[Tensor]:
    """A batch of each hook."""
    shards = [opened.result() for opened, _ in pieces]
    orders = [order.numpy() for _, order in pieces]
    return [_taken(list(rows), orders).to(dtype) for rows in zip(*shards, strict=True)]


def _taken(rows: list[Tensor], orders: list[np.ndarray]) -> Tensor:
    out = rows[0].new_empty(sum(map(len, orders)), *rows[0].shape[1:])
    start = 0
    for each, order in zip(rows, orders, strict=True):
        part = out[start : start + len(order)]
        np.take(_bits(each), order, axis=0, out=_bits(part), mode="clip")  # other modes copy once more
        start += len(order)
    return out


def _bits(rows: Tensor) -> np.ndarray:
    """The same memory as whole numbers: numpy knows no bfloat16."""
    return rows.view({2: torch.int16, 4: torch.int32}[rows.element_size()]).numpy()
