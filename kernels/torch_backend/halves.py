"""Run numpy on two threads: it releases the GIL while it compares, selects and sorts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

_N_HALVES = 2
_MANY = 128


def in_halves(n_rows: int, work: Callable[[slice], np.ndarray]) -> np.ndarray:
    """The results of `work` for both halves of the rows, concatenated; a few rows are not worth waking a thread for."""
    if n_rows < _MANY:
        return work(slice(0, n_rows))
    edges = [n_rows * part // _N_HALVES for part in range(_N_HALVES + 1)]
    return np.concatenate(list(_threads().map(work, map(slice, edges[:-1], edges[1:]))))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_N_HALVES, thread_name_prefix="saelab-halves")
