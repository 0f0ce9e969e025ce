"""Where a large table reaches its row's floor, when few entries do: compare, pack to bits, and look at non-zero words.

numpy compares small integers and packs bits at the speed of memory, where `torch.nonzero` walks byte by byte.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelab.kernels.ragged import ascending
from saelab.kernels.workspace import WORKSPACE

_CHUNK_ROWS = 32
_PARTS = 2  # numpy leaves the interpreter lock alone while it compares


def places_not_below(table: Tensor, floor: Tensor) -> Int[Tensor, " n"]:
    """Flat positions, ascending, of the entries of `table (rows, 64 * n)` that are `floor (rows)` or more."""
    if table.device.type != "cpu":
        return (table >= floor[:, None]).view(-1).nonzero().squeeze(1)
    rows, columns = table.shape
    words = WORKSPACE.take("words", (rows, columns // 64), torch.int64).numpy().view(np.uint64)
    values, least = table.numpy(), floor[:, None].numpy()
    edges = np.linspace(0, rows, _PARTS + 1).astype(int)
    parts = [slice(*edge) for edge in zip(edges[:-1], edges[1:], strict=True)]
    list(_pool().map(lambda part: _pack(values[part], least[part], words[part]), parts))
    return ascending(torch.from_numpy(_bits(words.reshape(-1))))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_PARTS, thread_name_prefix="saelab-places")


def _pack(values: np.ndarray, least: np.ndarray, words: np.ndarray) -> None:
    """One bit an entry, a few rows at a time, so that the comparison stays in the cache."""
    for start in range(0, len(values), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        bits = np.packbits(values[rows] >= least[rows], axis=None, bitorder="little")
        words[rows] = bits.view(np.uint64).reshape(words[rows].shape)


def _bits(words: np.ndarray) -> np.ndarray:
    """Positions of all set bits: the lowest of every word, then the next of those that have one."""
    at = np.flatnonzero(words != 0)
    left, found = words[at], []
    while len(at):
        lowest = left & (~left + np.uint64(1))
        found.append(at * 64 + np.bitwise_count(lowest - np.uint64(1)))
        left = left ^ lowest
        more = np.flatnonzero(left)
        at, left = at[more], left[more]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
