"""Find the few entries of a large table that reach their row's floor: compare, pack to bits, scan the non-zero words.

numpy compares small integers and packs bits at memory bandwidth, whereas `torch.nonzero` scans byte by byte.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelab.kernels.torch_backend.halves import in_halves
from saelab.kernels.workspace import WORKSPACE

_CHUNK_ROWS = 64
_INT32 = np.iinfo(np.int32).max


def flatnonzero_at_least(table: Tensor, floor: Tensor) -> Int[Tensor, " n"]:
    """Flat positions, ascending, of the entries of `table (rows, 64 * n)` that are at least `floor (rows)`."""
    if table.device.type != "cpu":
        return (table >= floor[:, None]).view(-1).nonzero().squeeze(1)
    rows, columns = table.shape
    words = WORKSPACE.take("words", (rows, columns // 64), torch.int64).numpy().view(np.uint64)
    values, floors = table.numpy(), floor[:, None].numpy()

    def search(part: slice) -> np.ndarray:
        _pack(values[part], floors[part], words[part])
        return _set_bits(words[part].reshape(-1), part.start * columns, words.size * 64)

    return torch.from_numpy(in_halves(rows, search).astype(np.int64))


def _pack(values: np.ndarray, floors: np.ndarray, words: np.ndarray) -> None:
    """Write one bit per entry into `words`, a few rows at a time so that the comparison stays in the cache."""
    room = np.empty((min(_CHUNK_ROWS, len(values)), values.shape[1]), bool)
    for start in range(0, len(values), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        hits = np.greater_equal(values[rows], floors[rows], out=room[: len(values[rows])])
        words[rows] = np.packbits(hits, axis=None, bitorder="little").view(np.uint64).reshape(words[rows].shape)


def _set_bits(words: np.ndarray, first: int, n_bits: int) -> np.ndarray:
    """Positions of all set bits, counted from `first`, sorted: each round takes the lowest remaining bit of every word."""
    words_at = np.flatnonzero(words != 0)
    left = words[words_at]
    narrow = np.int32 if n_bits <= _INT32 else np.int64  # sorts many times faster
    at = (words_at * 64 + first).astype(narrow)
    found = [at[:0]]
    while len(at):
        rest = left & (left - np.uint64(1))
        found.append(at + np.bitwise_count((left ^ rest) - np.uint64(1)))
        more = np.flatnonzero(rest)
        at, left = at[more], rest[more]
    return np.sort(np.concatenate(found))
