"""How metrics are written: the same in a notebook, a terminal and the dashboard."""

from __future__ import annotations


def number(value: float | None) -> str:
    """A metric to three significant digits, zeros included; an en dash for None."""
    if value is None:
        return "\u2013"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:#,.3g}".rstrip(".") if value and abs(value) < 999.5 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A fraction in per cent, with more digits below 1 %; an en dash for None."""
    if value is None:
        return "\u2013"
    return "0%" if value == 0 else f"{value:.3%}" if value < 0.01 else f"{value:.2%}"


def signed(value: float | None, digits: int) -> str:
    """A change with its sign and this many decimals; an en dash for None."""
    return "\u2013" if value is None else f"{value:+,.{digits}f}".replace("-", "\u2212")
