"""Examples over the whole range of a feature's activations: a few from each of several groups of equally many firings.

The strongest examples alone suggest that a feature means one thing; whether it does shows in those below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from saelab.features.records import Histogram

N_GROUPS, PER_GROUP = 5, 4


def share_below(histogram: Histogram, values: np.ndarray) -> np.ndarray:
    """The share of firings with a smaller magnitude, `(n,)`, interpolated within the log bins of the histogram."""
    edges, counts = histogram.edges, histogram.counts
    below = np.concatenate([[0.0], np.cumsum(counts)]) / max(counts.sum(), 1)
    return np.interp(np.log(np.maximum(values, 1e-30)), np.log(np.maximum(edges, 1e-30)), below)


def value_at(histogram: Histogram, share: float) -> float:
    """The magnitude below which that share of firings lies."""
    edges, counts = histogram.edges, histogram.counts
    below = np.concatenate([[0.0], np.cumsum(counts)]) / max(counts.sum(), 1)
    return float(np.exp(np.interp(share, below, np.log(np.maximum(edges, 1e-30)))))


def chosen(
    samples: Sequence[Mapping[str, np.ndarray]], histogram: Histogram
) -> list[tuple[int, int, tuple[float, float]]]:
    """(number of the sample, row in it, bounds of its group as shares) of the examples to show, the largest first.

    `samples` are arrays of examples in the order of preference within a group: a uniform sample first, then others that fill
    groups of which it holds too few.
    """
    taken: dict[int, list[tuple[float, int, int]]] = {group: [] for group in range(N_GROUPS)}
    seen: set[tuple[int, int]] = set()
    for number, arrays in enumerate(samples):
        if not arrays:
            continue
        magnitudes = np.abs(arrays["value"])
        groups = np.minimum((share_below(histogram, magnitudes) * N_GROUPS).astype(int), N_GROUPS - 1)
        for row, group in enumerate(groups.tolist()):
            token = int(arrays["sequence"][row]), int(arrays["position"][row])
            if token not in seen and len(taken[group]) < PER_GROUP:
                seen.add(token)
                taken[group].append((float(magnitudes[row]), number, row))
    return [
        (number, row, (group / N_GROUPS, (group + 1) / N_GROUPS))
        for group in reversed(range(N_GROUPS))
        for _, number, row in sorted(taken[group], reverse=True)
    ]
