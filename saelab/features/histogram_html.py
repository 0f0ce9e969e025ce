"""A feature's histogram as HTML without script: bars on a log axis, its quantiles, and a mark on the bin of the token of an
example that is pointed at or focused.

The mark is a style rule for each bin: it looks inside the nearest element whose class contains `sl-marks` for a token of that
bin (`data-at`), and so needs histogram and examples to stand in one such element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saelab.features.numbers import number
from saelab.features.quantiles import value_at
from saelab.features.records import EndNumbers, Histogram
from saelab.features.schema import bin_name

SCOPE = '[class*="sl-marks"]'
_GAP = 0.4
"""Width of the gap between negative and positive values, in octaves."""
_ROOM = 0.2
"""Share of the width that the text of a quantile needs."""


class Quantile(NamedTuple):
    """A line in the histogram."""

    name: str
    value: float
    """Negative at the negative end."""
    row: int
    """Which of the rows above the bars holds its text: 0 is the highest."""


def quantiles_of(end: EndNumbers, histogram: Histogram) -> list[Quantile]:
    """p50, p90, p99 and the maximum of one end, whose magnitudes are in `histogram`; p50 and p90 are interpolated in it."""
    values = {"max": end.max, "p99": end.p99} | {f"p{100 * s:.0f}": value_at(histogram, s) for s in (0.9, 0.5)}
    return [Quantile(name, end.sign * value, row) for row, (name, value) in enumerate(values.items())]


def histogram_html(histogram: Histogram, quantiles: Sequence[Quantile] = ()) -> str:
    """The histogram of signed values; its range and largest count as text."""
    edges, counts = histogram.edges, histogram.counts
    if not len(counts):
        return '<div class="sl-sub">No activations: the feature never fired.</div>'
    widths, tallest = _widths(edges), int(counts.max())
    bins = list(zip(edges.tolist(), edges[1:].tolist(), counts.tolist(), strict=False))
    label = f"{number(edges[0])} to {number(edges[-1])}, log scale; at most {tallest:,} tokens per bin"
    columns = " ".join(f"{width:.3f}fr" for width in widths)
    bars = "".join(_bar(low, high, count, tallest) for low, high, count in bins)
    ticks = "".join(_tick(one, edges, widths) for one in quantiles)
    said = "".join(f", {one.name} {number(one.value)}" for one in quantiles)
    return (
        f'<div class="sl-hist" role="img" aria-label="Histogram of {counts.sum():,} activations: {label}{said}">'
        f'<div class="sl-bars" style="grid-template-columns:{columns}">{bars}{ticks}</div></div>'
        f'<div class="sl-sub">{label}</div><style>{_marks(bins)}</style>'
    )


def _widths(edges: np.ndarray) -> np.ndarray:
    """Width of each bin in octaves."""
    low, high = np.abs(edges[:-1]), np.abs(edges[1:])
    return np.where(np.sign(edges[:-1]) == np.sign(edges[1:]), np.abs(np.log2(high / low)), _GAP)


def _bar(low: float, high: float, count: int, tallest: int) -> str:
    if not count:
        return "<span></span>"
    side = " sl-neg" if high <= 0 else ""
    return (
        f'<span class="sl-bin{side}" data-bin="{_bin(low, high)}" title="{number(low)} to {number(high)}: {count:,} tokens" '
        f'style="height:{max(100 * count / tallest, 1):.1f}%"></span>'
    )


def _bin(low: float, high: float) -> str:
    """The name of the bin between two edges, which are of one sign."""
    return bin_name(low if low > 0 else high)


def _tick(one: Quantile, edges: np.ndarray, widths: np.ndarray) -> str:
    """A line with its text, which stands where its end has room for it: towards smaller magnitudes if it can."""
    total = np.concatenate([[0.0], np.cumsum(widths)]) / widths.sum()
    side = "right" if one.value > 0 else "left"  # a value on an edge belongs to the bin of larger magnitudes
    i = int(np.clip(np.searchsorted(edges, one.value, side=side) - 1, 0, len(widths) - 1))
    share = np.clip(np.log2(abs(one.value / edges[i])) / np.log2(abs(edges[i + 1] / edges[i])), 0, 1)
    at = float(total[i] + share * (total[i + 1] - total[i]))
    here = np.flatnonzero(np.sign(edges) == np.sign(one.value))
    left = at - total[here[0]] >= _ROOM if one.value > 0 else total[here[-1]] - at < _ROOM
    return (
        f'<span class="sl-tick sl-q{one.row}{" sl-left" if left else ""}" style="left:{100 * at:.2f}%">'
        f"<span>{one.name} {number(one.value)}</span></span>"
    )


def _marks(bins: Sequence[tuple[float, float, int]]) -> str:
    names = [_bin(low, high) for low, high, count in bins if count]
    chosen = ",".join(f'{SCOPE}:has([data-at="{name}"]:is(:hover,:focus)) [data-bin="{name}"]' for name in names)
    return f'{chosen}{{--sl-mark:"\\25BC";outline:2px solid currentColor}}'
