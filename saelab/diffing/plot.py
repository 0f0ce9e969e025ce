"""Relative decoder norm against nu_error as an SVG without script: where candidates lie, and which of them survive.

Axes take the colour of the text around them, so the plot reads on light and dark ground; verdicts differ by mark and colour.
"""

from __future__ import annotations

import math

from saelab.diffing.judged import DECOUPLED, NOT_HELD, SHRUNK, SPECIFIC, Judged
from saelab.features.visible import escape

MARKS = {
    SPECIFIC: ("#0072b2", "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0"),
    SHRUNK: ("#d55e00", "M-4-4h8v8h-8z"),
    DECOUPLED: ("#e69f00", "M0-5L5 4h-10z"),
    NOT_HELD: ("#cc79a7", "M0-5L5 0 0 5-5 0z"),
}
LOWEST, HIGHEST = -0.5, 1.5
"""Of nu; what lies beyond is drawn at the edge."""
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 420, 240, 48, 12, 40
_MOST_POINTS = 1500


def plot(report: Judged) -> str:
    """The plot; "" where no feature fires often enough."""
    cloud, judged = report.cloud, [one for one in report.features if one.verdict in MARKS]
    if not cloud["feature"]:
        return ""
    marked = {one.feature for one in judged}
    faint = [
        (delta, nu)
        for feature, delta, nu in zip(cloud["feature"], cloud["delta"], cloud["nu_error"], strict=True)
        if feature not in marked and math.isfinite(delta) and math.isfinite(nu)
    ]
    step = max(1, -(-len(faint) // _MOST_POINTS))
    dots = "".join(f'<circle cx="{_x(delta):.1f}" cy="{_y(nu):.1f}" r="1.5"/>' for delta, nu in faint[::step])
    points = [_point(one.delta, one.nu_error.value, one.verdict, str(one.feature)) for one in judged]
    most = report.about["thresholds"]["nu_error"]
    band = f'<rect x="{_LEFT}" y="{_y(most):.1f}" width="{_WIDTH}" height="{_y(-most) - _y(most):.1f}" opacity=".07"/>'
    size = f"{_LEFT + _WIDTH + 8} {_TOP + _HEIGHT + _BOTTOM}"
    return (
        f'<svg viewBox="0 0 {size}" width="100%" style="max-width:40rem;font:11px system-ui,sans-serif" fill="currentColor" '
        f'role="img" aria-label="nu_error against relative decoder norm">{band}{"".join(_axes())}<g opacity=".3">{dots}</g>'
        f"{''.join(points)}</svg>"
    )


def legend(report: Judged) -> str:
    """What the marks mean, as HTML; only those that occur."""
    found = {one.verdict for one in report.features}
    marks = [
        f'<svg width="12" height="12" viewBox="-6 -6 12 12" aria-hidden="true"><path d="{mark}" fill="{colour}"/></svg> '
        f"{escape(verdict)}"
        for verdict, (colour, mark) in MARKS.items()
        if verdict in found
    ]
    return " &nbsp; ".join(marks)


def _x(delta: float) -> float:
    return _LEFT + _WIDTH * delta


def _y(nu: float) -> float:
    return _TOP + _HEIGHT * (HIGHEST - min(max(nu, LOWEST), HIGHEST)) / (HIGHEST - LOWEST)


def _point(delta: float, nu: float, verdict: str, name: str) -> str:
    if not math.isfinite(nu):
        return ""
    colour, mark = MARKS[verdict]
    return (
        f'<path transform="translate({_x(delta):.1f} {_y(nu):.1f})" d="{mark}" fill="{colour}" fill-opacity=".85">'
        f"<title>{escape(name)}</title></path>"
    )


def _axes() -> list[str]:
    found = []
    for delta in (0.0, 0.1, 0.4, 0.6, 0.9, 1.0):
        found.append(f'<path d="M{_x(delta):.1f} {_TOP}v{_HEIGHT}" stroke="currentColor" opacity=".12"/>')
        found.append(
            f'<text x="{_x(delta):.1f}" y="{_TOP + _HEIGHT + 15}" text-anchor="middle" opacity=".75">{delta:g}</text>'
        )
    for nu in (-0.5, 0.0, 0.5, 1.0, 1.5):
        heavy = ".45" if nu == 0 else ".12"
        found.append(f'<path d="M{_LEFT} {_y(nu):.1f}h{_WIDTH}" stroke="currentColor" opacity="{heavy}"/>')
        text = f"{nu:g}".replace("-", "\u2212")
        found.append(f'<text x="{_LEFT - 6}" y="{_y(nu) + 4:.1f}" text-anchor="end" opacity=".75">{text}</text>')
    place = f'x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 33}"'
    below = f'<text {place} text-anchor="middle">relative decoder norm: 0 only a, 1 only b</text>'
    turned = f'transform="translate(11 {_TOP + _HEIGHT / 2}) rotate(-90)"'
    return [*found, below, f'<text {turned} text-anchor="middle">nu_error</text>']
