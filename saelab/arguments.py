"""Checks of argument values that several public functions share."""

from __future__ import annotations

from typing import Any


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise `ValueError` naming the value unless it is an `int` from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        fix = f": write {int(value)}" if isinstance(value, float) and value.is_integer() else ""
        raise ValueError(f"{name}={value!r} must be a whole number, an int{fix}.")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name}={value} must be {bounds}.")
