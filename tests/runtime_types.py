"""The checker of annotations while the tests run: beartype, with an int accepted where a float is asked for, as pyright does.

jaxtyping's import hook puts `jaxtyping.jaxtyped` on every function of saelab. That one binds the arguments by inspect and
checks them twice, on functions without shapes too: half of the time of a small training. `jaxtyped` here checks the same once,
makes a function's checker when it is first called, and of its calls in one test checks the first `ALWAYS` and then one in
`ONE_IN`: a loop of a thousand steps shows nothing new.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

ALWAYS, ONE_IN = 4, 64
_counts: dict[int, int] = {}

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
_own, _scope = jaxtyping.jaxtyped, jaxtyping.jaxtyped("context")


def install() -> None:
    """From now on the import hook decorates with this file's `jaxtyped`."""
    jaxtyping.jaxtyped = jaxtyped


def begin_test() -> None:
    """Count calls anew."""
    _counts.clear()


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """The decorator of a function or class. Names of axes hold within one call of a function whose annotations have shapes."""

    def decorate(thing: Any) -> Any:
        if not inspect.isclass(thing):
            return _checked(thing, typechecker)
        if dataclasses.is_dataclass(thing) and not hasattr(thing.__init__, "__wrapped__"):
            thing.__init__ = _checked(thing.__init__, typechecker)
        return thing

    return decorate


def _checked(fn: Any, typechecker: Any) -> Any:
    if not inspect.isfunction(fn) or inspect.isgeneratorfunction(fn):
        return _own(fn, typechecker=typechecker)
    if not fn.__annotations__:
        return fn
    key, made = id(fn), []

    @functools.wraps(fn)
    def sampled(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        _counts[key] = n = _counts.get(key, 0) + 1
        if (n > ALWAYS and n % ONE_IN) or sys.is_finalizing():
            return fn(*args, **kwargs)
        inner, has_shapes = made[0] if made else made.append(_checker(fn, typechecker)) or made[0]
        if not has_shapes:
            return inner(*args, **kwargs)
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        with _scope:
            return inner(*args, **kwargs)

    return sampled


def _checker(fn: Any, typechecker: Any) -> tuple[Any, bool]:
    """The function with its annotations checked, and whether any of them has a shape."""
    hints = {name: _hint(annotation, fn.__globals__) for name, annotation in fn.__annotations__.items()}
    twin: Any = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    functools.update_wrapper(twin, fn)
    twin.__kwdefaults__ = fn.__kwdefaults__
    del twin.__wrapped__
    twin.__annotations__ = hints
    return typechecker(twin), any(map(_has_shapes, hints.values()))


def _hint(annotation: Any, names: dict[str, Any]) -> Any:
    """The type that an annotation names; Any where its name is not known at run time, as in jaxtyping."""
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"it": annotation}), names, include_extras=True)["it"]
    except Exception:
        return Any


def _has_shapes(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(
        map(_has_shapes, get_args(hint))
    )
