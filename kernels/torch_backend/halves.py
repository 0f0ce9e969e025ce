"""numpy on two threads: it leaves the interpreter lock alone while it compares, selects and sorts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

_PARTS = 2
_MANY = 128


def in_halves(n_rows: int, work: Callable[[slice], np.ndarray]) -> np.ndarray:
    """What `work` makes of each half of the rows, one after the other; few rows are not worth waking a thread."""
    if n_rows < _MANY:
        return work(slice(0, n_rows))
    edges = [n_rows * part // _PARTS for part in range(_PARTS + 1)]
    return np.concatenate(list(_pool().map(work, map(slice, edges[:-1], edges[1:]))))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_PARTS, thread_name_prefix="saelab-halves")
