"""Intervals and tests of shares: Wilson's and Newcombe's intervals, Fisher's exact test, Benjamini and Hochberg's q."""

from __future__ import annotations

from typing import Any

import numpy as np

Z = 1.96
"""Of a 95 % interval."""


def wilson(hits: Any, n: int, z: float = Z) -> tuple[Any, Any]:
    """Wilson's 95 % score interval of the share `hits / n`, for a number or an array of them; (0, 1) where n is 0."""
    if n == 0:
        return 0.0 * hits, 0.0 * hits + 1.0
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * np.sqrt(share * (1 - share) / n + spread / (4 * n))
    return middle - half, middle + half


def newcombe(hits_a: np.ndarray, n_a: int, hits_b: np.ndarray, n_b: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of hits_a / n_a - hits_b / n_b: Newcombe's hybrid score interval (1998, method 10), which joins the
    Wilson intervals of both shares."""
    a, b = hits_a / n_a, hits_b / n_b
    (low_a, high_a), (low_b, high_b) = wilson(hits_a, n_a), wilson(hits_b, n_b)
    return a - b - np.hypot(a - low_a, high_b - b), a - b + np.hypot(high_a - a, b - low_b)


def fisher(hits_a: np.ndarray, n_a: int, hits_b: np.ndarray, n_b: int) -> np.ndarray:
    """Two-sided p of Fisher's exact test that both shares are the same, for arrays of counts: the probability of all tables with
    these margins that are no likelier than the one observed."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n_a + n_b + 1)))])

    def log_choose(n: Any, k: Any) -> Any:
        return log_factorial[n] - log_factorial[k] - log_factorial[n - k]

    total, p = hits_a + hits_b, np.ones(len(hits_a))
    for hits in np.unique(total):
        possible = np.arange(max(0, hits - n_b), min(hits, n_a) + 1)
        logs = log_choose(n_a, possible) + log_choose(n_b, hits - possible) - log_choose(n_a + n_b, hits)
        order = np.sort(logs)
        summed = np.cumsum(np.exp(order))
        here = np.flatnonzero(total == hits)
        observed = logs[hits_a[here] - possible[0]]
        p[here] = summed[np.searchsorted(order, observed + 1e-7, side="right") - 1]
    return np.minimum(p, 1.0)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """The q of each test: the smallest false discovery rate at which it is among the discoveries (for independent or positively
    dependent tests)."""
    order = np.argsort(p, kind="stable")[::-1]
    scaled = p[order] * len(p) / np.arange(len(p), 0, -1)
    q = np.empty(len(p))
    q[order] = np.minimum(np.minimum.accumulate(scaled), 1.0)
    return q
