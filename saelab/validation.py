"""Argument checks that several public functions share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Raise `ValueError` naming the value unless it is an `int` from `minimum` to `maximum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        fix = f": write {int(value)}" if isinstance(value, float) and value.is_integer() else ""
        raise ValueError(f"{name}={value!r} must be a whole number, of type int{fix}.")
    if value < minimum or (maximum is not None and value > maximum):
        bounds = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"{name}={value} must be {bounds}.")


def check_numbers(config: Any) -> None:
    """Raise `ValueError` naming a field declared `float`, `float | None` or a tuple of them that holds something else or NaN."""
    for field in fields(config):
        value = getattr(config, field.name)
        if "float" not in str(field.type) or (value is None and "None" in str(field.type)):
            continue
        if isinstance(value, tuple) and "tuple" in str(field.type):
            if not all(map(_is_number, value)):
                raise ValueError(f"{field.name}={value!r} must be numbers.")
        elif not _is_number(value):
            raise ValueError(f"{field.name}={value!r} must be a number.")


def check_choices(config: Any) -> None:
    """Raise `ValueError` naming a field that is declared `Literal[...]` and holds something else."""
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal and getattr(config, name) not in get_args(kind):
            raise ValueError(f"{name}={getattr(config, name)!r} must be one of {', '.join(map(repr, get_args(kind)))}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
