"""The quiver as an SVG without script: for each set an arrow from the test AUC of the best baseline to that with SAE probes.

Drawn in the colour of the text around it, so it reads on light and dark ground; gains and losses differ by direction and colour.
"""

from __future__ import annotations

from collections.abc import Sequence

from saelab.features.visible import escape, visible
from saelab.probing.report import Arrow

GAIN, LOSS = "#0072b2", "#d55e00"
"""Of Okabe and Ito."""
_ROW, _LEFT, _WIDTH, _TOP, _BOTTOM = 15, 230, 420, 20, 34
_LONGEST = 34
"""Characters of a set's name."""


def quiver(arrows: Sequence[Arrow]) -> str:
    """The plot, the longest gain on top. Raises `ValueError` without an arrow."""
    if not arrows:
        raise ValueError("There is nothing to plot: give at least one arrow.")
    rows = sorted(arrows, key=lambda arrow: (arrow.before - arrow.after, -arrow.before))
    low = min(0.5, *(min(arrow.before, arrow.after) for arrow in rows)) - 0.01
    height = _TOP + _ROW * len(rows)
    shown = []
    for tick in (value / 10 for value in range(11)):
        if tick >= low:
            x = _x(tick, low)
            shown.append(f'<path d="M{x:.1f} {_TOP - 6}V{height}" stroke="currentColor" stroke-opacity=".15"/>')
            shown.append(f'<text x="{x:.1f}" y="{height + 14}" text-anchor="middle">{tick:g}</text>')
    shown += [one for i, arrow in enumerate(rows) for one in _arrow(arrow, _TOP + _ROW * (i + 0.5), low)]
    shown.append(f'<text x="{_LEFT + _WIDTH / 2}" y="{height + 30}" text-anchor="middle">test AUC</text>')
    return (
        f'<svg viewBox="0 0 {_LEFT + _WIDTH + 20} {height + _BOTTOM}" width="100%" fill="currentColor" role="img" '
        'style="max-width:46rem;font:11px system-ui,sans-serif" aria-label="Test AUC of the best baseline, and with SAE probes">'
        f"{''.join(shown)}</svg>"
    )


def _x(value: float, low: float) -> float:
    return _LEFT + _WIDTH * (value - low) / (1 - low)


def _arrow(arrow: Arrow, y: float, low: float) -> list[str]:
    """One line: the name, a dot where the baseline is, and the arrow."""
    start, end = _x(arrow.before, low), _x(arrow.after, low)
    name = escape(
        visible(arrow.set_name if len(arrow.set_name) <= _LONGEST else f"{arrow.set_name[: _LONGEST - 1]}\u2026")
    )
    colour = GAIN if arrow.after >= arrow.before else LOSS
    drawn = [
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{name}</text>',
        f'<circle cx="{start:.1f}" cy="{y:.1f}" r="2.2" fill-opacity=".6"/>',
    ]
    if abs(end - start) >= 0.5:
        side = 4 if end > start else -4
        head = f"M{end:.1f} {y:.1f}l{-side} -3v6z"
        drawn.append(f'<path d="M{start:.1f} {y:.1f}H{end:.1f}" stroke="{colour}" stroke-width="1.6"/>')
        drawn.append(f'<path d="{head}" fill="{colour}"/>')
    return drawn
