"""Reading and editing a language model at its hooks, and the error for a hook that it does not have.

Hooks exist only during one forward pass (`tapped`), so none can be left behind. (The exception: codebooks that a model is
trained with stay attached.)
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from saelab.errors import ModelError
from saelab.models.applying import Pass
from saelab.models.hook_places import HookPlace

_WRITES_TO_RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def writes_to_residual(hook_name: str) -> bool:
    """Whether activations at this hook are the residual stream, or are added to it unchanged, so that a vector there has a
    direct effect on the logits."""
    return hook_name.rpartition(".")[2] in _WRITES_TO_RESIDUAL


class CutForward(Exception):
    """Raised by the last capture to end the forward pass early."""


def hook_list(hook_names: str | Iterable[str]) -> list[str]:
    """A list of hook names, from several names or a single one. Raises `ValueError` if there is none."""
    names = [hook_names] if isinstance(hook_names, str) else list(hook_names)
    if not names:
        raise ValueError("hook_names is empty; give at least one hook.")
    return names


def unknown_hook(hook_name: str, names: Sequence[str], model_name: str) -> ValueError:
    """The error for a hook that a model does not have: the nearest names first, then a pattern that covers them all."""
    nearest = difflib.get_close_matches(str(hook_name), names, n=5, cutoff=0.0)
    layers = sorted({int(found[1]) for name in names if (found := re.match(r"blocks\.(\d+)\.", name))})
    suffixes = dict.fromkeys(name.split(".", 2)[2] for name in names if re.match(r"blocks\.\d+\.", name))
    others = [name for name in names if not re.match(r"blocks\.\d+\.", name)]
    shown = [f"blocks.{{{layers[0]}..{layers[-1]}}}.{{{', '.join(suffixes)}}}"] if layers else []
    return ValueError(
        f"hook_name={hook_name!r} does not exist in {model_name}. "
        f"Nearest: {', '.join(nearest)}. Available: {', '.join(shown + others)}."
    )


def is_plain_mistake(hook_name: str, names: Sequence[str]) -> bool:
    """Whether no bridge can have this hook either: a fast hook at a layer that does not exist, or no hook name at all."""
    suffix = re.sub(r"^blocks\.\d+\.", "", hook_name)
    return "hook_" not in suffix or any(name.endswith(f".{suffix}") for name in names)


@contextmanager
def tapped(
    hook_places: dict[str, HookPlace],
    edits: Pass | None = None,
    hook_names: Iterable[str] = (),
    captured: dict[str, Tensor] | None = None,
) -> Iterator[None]:
    """Install edits, then captures, for one forward pass; remove them all whatever happens.

    Edits at one hook are all computed from the same `x`; those at later hooks see the effect of earlier ones. Once every
    name in `hook_names` is in `captured`, the pass is cut.
    """
    handles: list[Any] = []
    edited = edits.hook_names if edits is not None else {}
    wanted, fired, was_cut = set(hook_names), Counter[str](), False
    try:
        for name in sorted(edited, key=list(hook_places).index):
            assert edits is not None
            handles += attach(hook_places[name], _counted(name, fired, edits.at(name)))
        for name in wanted:
            copied = hook_places[name].copied
            capture = _capturer(name, wanted, captured if captured is not None else {}, copied)
            handles += attach(hook_places[name], _counted(name, fired, capture))
        yield
    except CutForward:
        was_cut = True
    finally:
        for handle in handles:
            handle.remove()
    _check_fired([*edited, *wanted], fired, wanted if was_cut else ())


def _counted(
    name: str, fired: Counter[str], function: Callable[[Tensor], Tensor | None]
) -> Callable[..., Tensor | None]:
    def call(x: Tensor) -> Tensor | None:
        fired[name] += 1
        return function(x)

    return call


def _check_fired(names: Sequence[str], fired: Counter[str], cut_at: Iterable[str]) -> None:
    """Raises `ModelError` for an edit or capture that the pass did not reach. A pass that was cut ended at the last layer
    of `cut_at`: edits at that layer or later are not expected to have run."""
    end = max((_layer_of(name) for name in cut_at), default=None)
    missed = [name for name in names if not fired[name] and (end is None or _layer_of(name) < end)]
    if missed:
        raise ModelError(
            f"hook_name={missed[0]!r} exists, but the forward pass did not reach it, so the result is the same as without it. "
            "The layer is skipped, or runs compiled or replaced code: use another hook, or the plain model."
        )


def _layer_of(name: str) -> float:
    """The layer of a hook; infinity for hooks outside the layers."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else float("inf")


def _capturer(name: str, wanted: set[str], captured: dict[str, Tensor], copied: bool) -> Callable[[Tensor], None]:
    def capture(x: Tensor) -> None:
        captured[name] = x.clone() if copied else x
        if len(captured) == len(wanted):
            raise CutForward

    return capture


def attach(place: HookPlace, function: Callable[[Tensor], Tensor | None]) -> list[Any]:
    """Call `function` with the tensor at `place`; its result, unless None, replaces the tensor.

    Returns handles with `remove()`. Functions are called in the order in which they were attached.
    """
    if place.flattened:
        return _attach_flattened(place, function)
    if place.kind == "point":
        return [_HookPointHandle(place.module, function)]
    if place.kind == "output":
        return [place.module.register_forward_hook(lambda _m, _a, output: _replace_output(output, function))]
    if place.kind == "input":
        return [place.module.register_forward_pre_hook(_replace_input(function), with_kwargs=True)]
    return _attach_mid(place, function)


def _attach_flattened(place: HookPlace, function: Callable[[Tensor], Tensor | None]) -> list[Any]:
    """`function` gets `(batch, seq, d)` where the model has `(batch * seq, d)`; the layer's input has the sizes."""
    assert place.layer is not None
    sizes: list[int] = []

    def note(x: Tensor) -> None:
        sizes[:] = x.shape[:-1]

    def unflattened(x: Tensor) -> Tensor | None:
        result = function(x.reshape(*sizes, -1))
        return None if result is None else result.reshape(x.shape)

    return [
        *attach(HookPlace(place.layer, "input"), note),
        *attach(place._replace(flattened=False), unflattened),
    ]


def _attach_mid(place: HookPlace, function: Callable[[Tensor], Tensor | None]) -> list[Any]:
    """The stream before the MLP's norm goes both into the norm and around the MLP: change both."""
    assert place.layer is not None
    change: list[Tensor] = []

    def at_norm(x: Tensor) -> Tensor | None:
        result = function(x)
        if result is not None and result is not x:
            change[:] = [result - x]  # a pass that was cut may have left one
        return result

    def at_layer_end(x: Tensor) -> Tensor | None:
        return x + change.pop().reshape(x.shape) if change else None

    return [
        *attach(HookPlace(place.module, "input"), at_norm),
        *attach(HookPlace(place.layer, "output"), at_layer_end),
    ]


def _replace_output(output: Any, function: Callable[[Tensor], Tensor | None]) -> Any:
    """Forward-hook body; some layers return a tuple whose first entry is the tensor."""
    if not isinstance(output, tuple):
        return function(output)
    result = function(output[0])
    return None if result is None else (result, *output[1:])


def _replace_input(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """Forward-pre-hook body; the tensor is the first argument or the keyword `hidden_states`."""

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        result = function(args[0] if args else kwargs["hidden_states"])
        if result is None:
            return None
        return ((result, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": result})

    return hook


class _HookPointHandle:
    """A hook on a TransformerLens hook point, removable like torch's own handles."""

    def __init__(self, point: Any, function: Callable[[Tensor], Tensor | None]):
        self.point = point
        self.handle = point.add_hook(lambda x, hook: function(x))

    def remove(self) -> None:
        self.handle.hook.remove()
        if self.handle in self.point.fwd_hooks:
            self.point.fwd_hooks.remove(self.handle)
