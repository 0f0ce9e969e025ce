"""Effect against cost as an SVG without script: one line for each way to steer, its points by strength, intervals as strokes.

Axes are drawn in the colour of the text around it, so it reads on light and dark ground; ways differ by mark and dash too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from saelab.features.visible import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of Okabe and Ito."""
_MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "M-4-4h8v8h-8z",
    "M0-5L5 4h-10z",
    "M0-5L5 0 0 5-5 0z",
    "M-4-4L4 4M-4 4L4-4",
)
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _LEGEND = 420, 230, 48, 12, 40, 190


class Point(NamedTuple):
    """One way at one strength."""

    cost: float
    effect: float
    low: float
    """Ends of the interval of the effect."""
    high: float
    name: str = ""
    """Written beside it in the first series."""


def effect_plot(series: Mapping[str, Sequence[Point]], cost_name: str, effect_name: str) -> str:
    """The plot. Raises `ValueError` without any point."""
    points = [point for row in series.values() for point in row]
    if not points:
        raise ValueError("There is nothing to plot: give at least one point.")
    x_ticks = _ticks([0.0, *(point.cost for point in points)])
    y_ticks = _ticks([0.0, *(value for point in points for value in (point.low, point.high))])
    to = _Scale(x_ticks, y_ticks)
    shown = [*_axes(to, cost_name, effect_name)]
    for i, (name, row) in enumerate(series.items()):
        shown += _line(row, i, to)
        y = _TOP + 14 + 20 * i
        shown.append(f'<g transform="translate({_LEFT + _WIDTH + 44} {y - 4})">{_mark(i)}</g>')
        shown.append(f'<text x="{_LEFT + _WIDTH + 56}" y="{y}">{escape(name)}</text>')
    size = f"{_LEFT + _WIDTH + _LEGEND} {_TOP + _HEIGHT + _BOTTOM}"
    label = escape(f"{effect_name} against {cost_name}")
    return (
        f'<svg viewBox="0 0 {size}" width="100%" style="max-width:44rem;font:11px system-ui,sans-serif" fill="currentColor" '
        f'role="img" aria-label="{label}">{"".join(shown)}</svg>'
    )


class _Scale:
    """Places of values in the plot."""

    def __init__(self, x_ticks: list[float], y_ticks: list[float]) -> None:
        self.x_ticks, self.y_ticks = x_ticks, y_ticks

    def x(self, value: float) -> float:
        return _LEFT + _WIDTH * (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])

    def y(self, value: float) -> float:
        return _TOP + _HEIGHT * (self.y_ticks[-1] - value) / (self.y_ticks[-1] - self.y_ticks[0])


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from below the smallest value to above the largest."""
    low, high = min(values), max(values)
    raw = max(high - low, 1e-6) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= raw)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [i * step for i in range(first, last + 1)]


def _axes(to: _Scale, cost_name: str, effect_name: str) -> list[str]:
    found = []
    for x in to.x_ticks:
        found.append(f'<path d="M{to.x(x):.1f} {_TOP}v{_HEIGHT}" stroke="currentColor" opacity=".12"/>')
        found.append(
            f'<text x="{to.x(x):.1f}" y="{_TOP + _HEIGHT + 15}" text-anchor="middle" opacity=".75">{_number(x)}</text>'
        )
    for y in to.y_ticks:
        heavy = ".45" if y == 0 else ".12"
        found.append(f'<path d="M{_LEFT} {to.y(y):.1f}h{_WIDTH}" stroke="currentColor" opacity="{heavy}"/>')
        found.append(f'<text x="{_LEFT - 6}" y="{to.y(y) + 4:.1f}" text-anchor="end" opacity=".75">{_number(y)}</text>')
    middle = _LEFT + _WIDTH / 2
    found.append(f'<text x="{middle}" y="{_TOP + _HEIGHT + 33}" text-anchor="middle">{escape(cost_name)}</text>')
    turned = f'transform="translate(11 {_TOP + _HEIGHT / 2}) rotate(-90)"'
    return [*found, f'<text {turned} text-anchor="middle">{escape(effect_name)}</text>']


def _line(row: Sequence[Point], i: int, to: _Scale) -> list[str]:
    colour, dash = COLOURS[i % len(COLOURS)], "" if i == 0 else f' stroke-dasharray="{2 + 2 * i} 3"'
    path = "L".join(f"{to.x(one.cost):.1f} {to.y(one.effect):.1f}" for one in row)
    found = [f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'] if len(row) > 1 else []
    for one in row:
        x, low, high = to.x(one.cost), to.y(one.low), to.y(one.high)
        found.append(f'<path d="M{x:.1f} {high:.1f}V{low:.1f}" stroke="{colour}" opacity=".45"/>')
        found.append(f'<g transform="translate({x:.1f} {to.y(one.effect):.1f})">{_mark(i)}</g>')
        if one.name and i == 0:  # the controls have the same strengths
            found.append(
                f'<text x="{x + 7:.1f}" y="{to.y(one.effect) - 6:.1f}" opacity=".85">{escape(one.name)}</text>'
            )
    return found


def _mark(i: int) -> str:
    colour = COLOURS[i % len(COLOURS)]
    stroke = f' stroke="{colour}" stroke-width="2"' if i % len(_MARKS) == 4 else ""
    return f'<path d="{_MARKS[i % len(_MARKS)]}" fill="{colour}"{stroke}/>'


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "\u2212") if abs(value) > 1e-12 else "0"
