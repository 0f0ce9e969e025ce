"""Bootstrap intervals of a mean: how far it might have come out otherwise, had other prompts and seeds been drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def covers_zero(self) -> bool:
        return self.low <= 0 <= self.high


def mean_interval(values: Sequence[float] | Sequence[Sequence[float]], seed: int = 0, n: int = 2000) -> Estimate:
    """The mean, and the 2.5th and 97.5th percentile of the means of `n` resamples.

    For rows of equal length, such as the texts of each prompt, rows are drawn first and then values within each, since what one
    prompt yields is alike. Raises `ValueError` without any value.
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ValueError("mean_interval needs at least one value.")
    generator, rows = np.random.default_rng(seed), array.reshape(len(array), -1)
    drawn = rows[generator.integers(0, len(rows), (n, len(rows)))]  # (n, rows, width)
    if rows.shape[1] > 1:
        drawn = np.take_along_axis(drawn, generator.integers(0, rows.shape[1], drawn.shape), axis=2)
    low, high = np.quantile(drawn.mean((1, 2)), (0.025, 0.975))
    return Estimate(float(array.mean()), float(low), float(high))


def difference_interval(a: Sequence[float], b: Sequence[float], seed: int = 0, n: int = 2000) -> Estimate:
    """The difference of the means of two independent samples, likewise. Raises `ValueError` if one is empty."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (a, b))
    if not len(x) or not len(y):
        raise ValueError(f"difference_interval needs values on both sides, got {len(x)} and {len(y)}.")
    generator = np.random.default_rng(seed)
    means = [one[generator.integers(0, len(one), (n, len(one)))].mean(1) for one in (x, y)]
    low, high = np.quantile(means[0] - means[1], (0.025, 0.975))
    return Estimate(float(x.mean() - y.mean()), float(low), float(high))
