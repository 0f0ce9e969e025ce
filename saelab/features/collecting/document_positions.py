"""Where each token stands in its document, for packed contexts, which begin and end inside documents."""

from __future__ import annotations

import numpy as np


def document_positions(docs: np.ndarray, n_start: int) -> np.ndarray:
    """The number of tokens in front of each one in its document, `(n_contexts * ctx_len,)`; -1 on padding.

    `docs (n_contexts, ctx_len)` names each token's document; the first `n_start` tokens of a context (BOS) count as none.
    """
    body = np.ones(docs.shape, dtype=bool)
    body[:, :n_start] = False
    flat, counted = docs.reshape(-1), body.reshape(-1)
    before = np.cumsum(counted) - counted
    real = flat >= 0
    found, first = np.unique(flat[real & counted], return_index=True)
    begins = np.zeros(int(flat.max(initial=-1)) + 1, dtype=np.int64)
    begins[found] = before[real & counted][first]
    return np.where(real, np.maximum(before - begins[np.where(real, flat, 0)], 0), -1)
