"""Argument checks that several public functions share."""

from __future__ import annotations

import math
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MOST = 1e30
"""Largest magnitude of a number in a config: in float32, sums of products with it are still finite."""
MAY_BE_INFINITE = {"infinite": True}
"""Metadata of fields for which infinity means "no limit"."""


def check_integer(name: str, value: Any, minimum: int | None, maximum: int | None = None) -> None:
    """Raise `ValueError` naming the value unless it is an `int` from `minimum` to `maximum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        fix = f": write {int(value)}" if isinstance(value, float) and value.is_integer() else ""
        raise ValueError(f"{name}={value!r} must be a whole number, of type int{fix}.")
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        bounds = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"{name}={value} must be {bounds}.")


def check_fields(config: Any) -> None:
    """Raise `ValueError` naming a field of a dataclass whose value is not of the kind it is declared to be: a whole number, a
    finite number, a choice, `True` or `False`, or a tuple of numbers."""
    kinds = get_type_hints(type(config))
    for field in fields(config):
        value, options = getattr(config, field.name), _options(kinds[field.name])
        if value is None and type(None) in options:
            continue
        for kind in options:
            _check_kind(field.name, value, kind, "infinite" in field.metadata)


def check_at_least(config: Any, minimum: float, *names: str, fix: str = "") -> None:
    """Raise `ValueError` naming a field that is below `minimum`; one that holds None is not looked at."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            must = "not be negative" if minimum == 0 else f"be at least {minimum:g}"
            raise ValueError(f"{name}={value} must {must}{fix}.")


def check_positive(config: Any, *names: str, fix: str = "") -> None:
    """Raise `ValueError` naming a field that is not above 0, in float32 too; one that holds None is not looked at."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 1 / MOST:
            raise ValueError(f"{name}={value} must be positive{fix}.")


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _check_kind(name: str, value: Any, kind: Any, may_be_infinite: bool) -> None:
    if kind is int:
        check_integer(name, value, None)
    elif kind is bool and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False.")
    elif kind is float and not _is_number(value):
        raise ValueError(f"{name}={value!r} must be a number.")
    elif kind is float and not abs(value) <= MOST and not (may_be_infinite and math.isinf(value)):
        raise ValueError(f"{name}={value!r} must be a finite number, of magnitude at most {MOST:g}.")
    elif get_origin(kind) is Literal and value not in get_args(kind):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, get_args(kind)))}.")
    elif float in get_args(kind) and not (isinstance(value, tuple | list) and all(map(_is_bounded, value))):
        raise ValueError(f"{name}={value!r} must be numbers.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _is_bounded(value: Any) -> bool:
    return _is_number(value) and abs(value) <= MOST
