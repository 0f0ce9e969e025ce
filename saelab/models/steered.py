"""What `lm.steer` is told: edits, the tokens at which they apply, and how far they may go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max
_MOST_POSITIONS, _LAST_POSITION = 10_000, 2**31 - 1
On = Literal["both", "prompt", "generated"]


@runtime_checkable
class Edit(Protocol):
    """An edit for `lm.steer`: any object with these two members. One that may change the first token has `first_token = True`."""

    @property
    def hook_name(self) -> str: ...

    def apply(self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]) -> Tensor:
        """The edited `x`, same shape. `positions` are absolute (KV cache counted), -1 on padding and on tokens that the options
        of `lm.steer` leave out. These, and the first token, keep their activations whatever is returned for them."""
        ...


def at_each_hook(edits: Iterable[Any]) -> tuple[Any, ...]:
    """The edits, those at several hooks (`edit.each_hook()`) as one for each."""
    each = (edit.each_hook() if hasattr(edit, "each_hook") else (edit,) for edit in edits)
    return tuple(one for several in each for one in several)


@runtime_checkable
class Gate(Protocol):
    """Says of each token whether the edits apply to it; from `feature.above(0.5)` or `direction.above(0.0)`."""

    @property
    def hook_name(self) -> str: ...

    def is_open(self, x: Float[Tensor, "batch seq d_in"]) -> Bool[Tensor, "batch seq"]:
        """From the activations at the gate's hook, before the edits."""
        ...


class Tokens(NamedTuple):
    """The tokens of one forward pass."""

    positions: Int[Tensor, "batch seq"]
    """Absolute; -1 on padding."""
    n_prompt: Int[Tensor, " batch"]
    """Tokens of each sequence's prompt; those at later positions were generated."""
    special: Bool[Tensor, "batch seq"]


@dataclass(frozen=True, eq=False)
class Steering:
    """Edits and the options of `lm.steer`, checked. Raises `ValueError` for an option that cannot be met, and for two edits that
    set the same feature."""

    edits: Any
    """A tuple, made of any sequence."""
    on: Any = "both"
    """Which tokens: those of the prompt, those that the model generated, or both."""
    positions: Any = None
    """Only these, a tuple of integers; negative ones count from the end of the prompt."""
    window: Any = None
    """Only these, from the first to before the second, as in a slice; negative ones count from the end of the prompt."""
    gate: Any = None
    """Only tokens at which it is open."""
    keep_norm: Any = False
    """Rescale every edited activation to the norm that it had."""
    cap: float | None = None
    """Largest change, as a multiple of the activation's norm; larger ones are shortened."""

    def __post_init__(self) -> None:
        edits: Any = self.edits
        object.__setattr__(self, "edits", tuple(edits) if isinstance(edits, Iterable) else (edits,))
        if self.on not in get_args(On):
            raise ValueError(f"on={self.on!r} is unknown; expected {', '.join(map(repr, get_args(On)))}.")
        if self.positions is not None and self.window is not None:
            raise ValueError(f"positions={self.positions} and window={self.window}: give one of the two.")
        if self.positions is not None:
            object.__setattr__(self, "positions", _checked_positions(self.positions))
        if self.window is not None:
            object.__setattr__(self, "window", _checked_window(self.window))
        if self.gate is not None and not callable(getattr(self.gate, "is_open", None)):
            raise ValueError(
                f"gate={str(self.gate)[:80]} is no gate: make one with feature.above(0.5) or direction.above(0.0)."
            )
        if not isinstance(self.keep_norm, bool):
            raise ValueError(f"keep_norm={self.keep_norm!r}; expected True or False.")
        if self.cap is not None and not (_is_number(self.cap) and 0 < self.cap <= _LARGEST):
            raise ValueError(f"cap={self.cap!r}; expected a positive multiple of the activation's norm, such as 1.0.")
        refuse_conflicts(self.edits)

    @property
    def is_bounded(self) -> bool:
        """Whether the sum of the changes is altered."""
        return self.keep_norm or self.cap is not None

    def selected(self, tokens: Tokens) -> Bool[Tensor, "batch seq"]:
        """The tokens at which the edits apply, but for the gate. Special tokens behind the first are left out unless `positions`
        names them; the first is for edits of the `first_token`."""
        at, n, keep = tokens.positions, tokens.n_prompt[:, None], self.in_phase(tokens)
        if self.positions is not None:
            named = torch.tensor(self.positions, device=at.device)
            named = torch.where(named < 0, named + n, named)  # (batch, n_named)
            return keep & (at[:, :, None] == named[:, None]).any(-1)
        for bound, is_inside in zip(self.window or (None, None), (torch.ge, torch.lt), strict=True):
            if bound is not None:
                keep = keep & is_inside(at, bound + n if bound < 0 else torch.full_like(n, bound))
        return keep & ~(tokens.special & (at > 0))

    def in_phase(self, tokens: Tokens) -> Bool[Tensor, "batch seq"]:
        """The tokens that `on` admits."""
        at, n = tokens.positions, tokens.n_prompt[:, None]
        if self.on == "both":
            return at >= 0
        return (at >= 0) & ((at < n) if self.on == "prompt" else (at >= n))

    def describe(self) -> str:
        """The options that choose tokens, as they are written."""
        given = {"on": self.on, "positions": self.positions, "window": self.window}
        shown = [f"{name}={value!r}" for name, value in given.items() if value not in (None, "both")]
        return ", ".join(shown) or "on='both'"


def _checked_positions(positions: Any) -> tuple[int, ...]:
    positions = positions.tolist() if hasattr(positions, "tolist") else positions
    listed = [positions] if _is_integer(positions) else positions
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed or not all(map(_is_integer, listed)):
        raise ValueError(f"positions={positions!r}; expected integers such as [3, -1].")
    if 0 in listed:
        raise ValueError(
            f"positions={positions!r} has 0, the first token, which takes the attention of all others and is never edited."
        )
    distinct = tuple(dict.fromkeys(int(one) for one in listed))
    largest = max(map(abs, distinct))
    if len(distinct) > _MOST_POSITIONS or largest > _LAST_POSITION:
        raise ValueError(f"positions names {len(distinct)}, up to {largest}; at most {_MOST_POSITIONS} are possible.")
    return distinct


def _checked_window(window: Any) -> tuple[int | None, int | None]:
    window = window.tolist() if hasattr(window, "tolist") else window
    if not isinstance(window, Sequence) or isinstance(window, str) or len(window) != 2:
        raise ValueError(f"window={window!r}; expected a start and an end, such as (-4, None).")
    if not all(bound is None or _is_integer(bound) for bound in window):
        raise ValueError(f"window={window!r}; start and end are integers, or None where it is open.")
    if any(bound is not None and abs(bound) > _LAST_POSITION for bound in window):
        raise ValueError(f"window={window!r} is beyond any context.")
    start, end = window
    if start is not None and end is not None and (start < 0) == (end < 0) and start >= end:
        raise ValueError(f"window={window!r} is empty: its start is not before its end.")
    return start, end


def refuse_conflicts(edits: Sequence[Any]) -> None:
    """Raises `ValueError` for two edits that set the same activation: they would not say which counts."""
    seen: dict[Any, list[tuple[int, Any]]] = {}
    for edit in edits:
        found = getattr(edit, "sets", ())
        for target, end in found:
            for other_end, other in seen.get(target, []):
                if other_end == end or 0 in (other_end, end):
                    raise ValueError(f"{other!r} and {edit!r} both set the same activation: keep one of them, or add.")
        for target, end in found:
            seen.setdefault(target, []).append((end, edit))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
