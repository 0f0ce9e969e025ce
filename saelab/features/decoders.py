"""Decoder rows as a feature store compares and shows them, whichever way the SAE stores them."""

from __future__ import annotations

import numpy as np


def by_source(W_dec: np.ndarray, d_sae: int) -> np.ndarray:
    """`(n_sources, d_sae, width)` where an SAE has several sources, otherwise `(d_sae, width)`.

    A cross-layer transcoder stores the targets one after the other, each with the rows of the features of its own and earlier
    layers, `d_sae (n_sources + 1) / 2` in all; the others are 0.
    """
    if W_dec.ndim == 3 or len(W_dec) == d_sae:
        return W_dec
    n_sources = 2 * len(W_dec) // d_sae - 1
    full = np.zeros((n_sources, d_sae, W_dec.shape[1]), dtype=W_dec.dtype)
    first = 0
    for source in range(n_sources):
        n_rows = (source + 1) * d_sae // n_sources
        full[source, :n_rows] = W_dec[first : first + n_rows]
        first += n_rows
    return full
