"""Plots of benchmark rows as SVG text, which a README can show without scripts. Colours are those of Okabe and Ito."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a00", "#000000")
_MARKS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-4-4h8v8h-8z", "M0-5L5 4h-10z", "M0-5L5 0 0 5-5 0z")
_GREY = "#808080"
_PANEL, _ROW, _LABELS = 250, 20, 190
_WIDTH, _HEIGHT, _LEFT, _TOP = 520, 340, 64, 16

Points = Sequence[tuple[float, float]]


def dot_plot(blocks: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], panels: Sequence[str]) -> str:
    """`blocks[block][label][panel]` are the values of a measure over the seeds: one dot each, and a stroke at their mean.

    There is one line per label and one panel per measure; the axis of a panel runs from 0 to the largest value of the block.
    """
    height = 30 + sum(_ROW * (len(labels) + 2) for labels in blocks.values())
    width = _LABELS + len(panels) * (_PANEL + 30)
    parts = [_text(_LABELS + i * (_PANEL + 30), 18, panel, "start", True) for i, panel in enumerate(panels)]
    top = 30
    for block, labels in blocks.items():
        parts.append(_text(8, top + 14, block, "start", True))
        for i, panel in enumerate(panels):
            values = {label: measures.get(panel, ()) for label, measures in labels.items()}
            parts += _dots(values, _LABELS + i * (_PANEL + 30), top + _ROW)
        parts += [_text(_LABELS - 12, top + _ROW * (n + 1) + 14, label, "end") for n, label in enumerate(labels)]
        top += _ROW * (len(labels) + 2)
    return _svg(width, height, parts)


def _dots(values: Mapping[str, Sequence[float]], left: float, top: float) -> list[str]:
    highest = max((value for row in values.values() for value in row), default=0) or 1.0
    place = lambda value: left + _PANEL * value / highest  # noqa: E731
    bottom = top + _ROW * len(values)
    parts = [_line(left, bottom, left + _PANEL, bottom), _text(left, bottom + 13, "0", "middle")]
    parts.append(_text(left + _PANEL, bottom + 13, f"{highest:.3g}", "middle"))
    for n, row in enumerate(values.values()):
        y = top + _ROW * (n + 0.5)
        parts.append(_line(left, y, left + _PANEL, y, 0.2))
        parts += [f'<circle cx="{place(v):.1f}" cy="{y}" r="4" fill="{COLOURS[0]}" fill-opacity=".55"/>' for v in row]
        if row:
            x = place(sum(row) / len(row))
            parts.append(f'<path d="M{x:.1f} {y - 7}v14" stroke="{COLOURS[1]}" stroke-width="2"/>')
    return parts


def curves(series: Mapping[str, Points], x_name: str, y_name: str) -> str:
    """The points `(x, y)` of each series joined by a line, on log-log axes with a legend. Raises `ValueError` without points."""
    axes = _Axes([point for row in series.values() for point in row])
    parts = axes.drawn(x_name, y_name)
    for n, (name, row) in enumerate(series.items()):
        colour, mark = COLOURS[n % len(COLOURS)], _MARKS[n // len(COLOURS) % len(_MARKS)]
        placed = [axes.place(*point) for point in sorted(row)]
        legend = _LEFT + _WIDTH + 24, _TOP + 12 + 20 * n
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [_mark(x, y, colour, mark) for x, y in (*placed, legend)]
        parts.append(_text(legend[0] + 12, legend[1] + 4, name, "start"))
    return _svg(_LEFT + _WIDTH + 200, max(_TOP + _HEIGHT + 48, 40 + 20 * len(series)), parts)


def scatter(points: Points, x_name: str, y_name: str) -> str:
    """Each point `(x, y)`, of positive values, as a dot on log-log axes. Raises `ValueError` without points."""
    axes = _Axes(points)
    placed = [axes.place(*point) for point in points]
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.5" fill="{COLOURS[0]}" fill-opacity=".4"/>' for x, y in placed]
    return _svg(_LEFT + _WIDTH + 24, _TOP + _HEIGHT + 48, [*axes.drawn(x_name, y_name), *dots])


class _Axes:
    """Log-log axes around points."""

    def __init__(self, points: Points) -> None:
        if not points:
            raise ValueError("There are no points to draw: pass at least one series with a point.")
        self._x, self._y = _around([x for x, _ in points]), _around([y for _, y in points])

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is in the picture."""
        (x_low, x_high), (y_low, y_high) = self._x, self._y
        return (
            _LEFT + _WIDTH * math.log(x / x_low) / math.log(x_high / x_low),
            _TOP + _HEIGHT * math.log(y_high / y) / math.log(y_high / y_low),
        )

    def drawn(self, x_name: str, y_name: str) -> list[str]:
        """Both axes, with ticks and names."""
        bottom, right = _TOP + _HEIGHT, _LEFT + _WIDTH
        parts = [_line(_LEFT, bottom, right, bottom), _line(_LEFT, _TOP, _LEFT, bottom)]
        for tick in _ticks(*self._x):
            x, _ = self.place(tick, self._y[0])
            parts += [_line(x, _TOP, x, bottom, 0.2), _text(x, bottom + 16, f"{tick:g}", "middle")]
        for tick in _ticks(*self._y):
            _, y = self.place(self._x[0], tick)
            parts += [_line(_LEFT, y, right, y, 0.2), _text(_LEFT - 6, y + 4, f"{tick:g}", "end")]
        return [*parts, _text(_LEFT + _WIDTH / 2, bottom + 36, x_name, "middle"), _text(8, 12, y_name, "start")]


def _around(values: Sequence[float]) -> tuple[float, float]:
    """A range with a margin on both sides of positive values."""
    low, high = max(min(values), 1e-6), max(*values, 1e-6)
    return low / 1.15, high * 1.15


def _ticks(low: float, high: float) -> list[float]:
    """Tick positions in a positive range: powers of two within 1 to 512, else 1, 1.5, 2, 3, 5, 7 per decade, or 1 alone."""
    powers = [2.0**n for n in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = (1, 1.5, 2, 3, 5, 7) if high < 100 * low else (1,)
    steps = powers if low >= 1 and high <= 512 else [step * 10.0**n for n in decades for step in within]
    return [tick for tick in steps if low <= tick <= high]


def _mark(x: float, y: float, colour: str, shape: str) -> str:
    return f'<path transform="translate({x:.1f} {y:.1f})" d="{shape}" fill="{colour}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float = 1.0) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{_GREY}" stroke-opacity="{opacity}"/>'


def _text(x: float, y: float, text: str, anchor: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{html.escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        'font-family="sans-serif" font-size="12" fill="#222"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )
