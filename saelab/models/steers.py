"""`lm.steer`: the blocks of edits that are open, and the report of what they did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.models.applied import HookReport, Tally, check_applied
from saelab.models.applying import Block, Pass
from saelab.models.hooks import unknown_hook
from saelab.models.model_lock import ModelLock
from saelab.models.prompts import Prompt
from saelab.models.steered import Edit, Gate, On, Steering, Tokens, at_each_hook, refuse_conflicts


class _Open:
    """A block of a model, for as long as it is open: once it has ended, in whichever thread, it has for all that saw it."""

    def __init__(self, key: object, block: Block) -> None:
        self.key, self.block, self.ended = key, block, False


_OPEN: ContextVar[tuple[_Open, ...]] = ContextVar("saelab_steer", default=())
"""The blocks that were opened; each thread and each coroutine sees its own."""


class Steers:
    """The steering methods of `LanguageModel`."""

    name: str
    backend: Any
    d_in: Callable[[str], int]
    hook_names: Any
    special_ids: Any
    logits: Callable[[Prompt], Tensor]
    _lock: ModelLock
    _key: object
    """What the model's open blocks are found by."""
    _tallies: dict[Any, Tally]
    last_report: tuple[HookReport, ...] = ()
    """What the edits did in the last call that ran under some: one entry for each `steer` block and hook."""

    @contextmanager
    def steer(
        self,
        *edits: Edit | Steering,
        on: On = "both",
        positions: Sequence[int] | None = None,
        window: Sequence[int | None] | None = None,
        gate: Gate | None = None,
        keep_norm: bool = False,
        cap: float | None = None,
    ) -> Iterator[Any]:
        """Apply edits to everything this model computes inside the block. Blocks may be nested: all edits then apply.

        Edits at one hook are computed from the same activations and their changes added. They apply to the tokens of the
        prompt, to those that are `generated`, or to `both`; to all of these, to the `positions` named, or to a `window` (start,
        end), negative ones counted from the end of the prompt; with a `gate` only where it is open. The first token is left
        alone, as are special tokens that `positions` does not name. `keep_norm` rescales edited activations to the norm that they
        had, `cap` limits a change to that multiple of the norm. Instead of edits and options, a `saelab.steering.Plan`.

        The block steers the thread, or coroutine, that opened it. Other threads that call the model wait until it ends, which may
        be in any thread, where a generator holds it open. `last_report` says afterwards what was changed. Raises `ValueError` for
        an edit at a hook that cannot be edited, or whose width is not the hook's, and for options that cannot be met; a call
        inside the block raises `SteeringError` when its edits applied to no token at all.
        """
        options = {"on": on, "positions": positions, "window": window, "gate": gate, "keep_norm": keep_norm, "cap": cap}
        with self._opened([Block(self._checked(steering)) for steering in _steerings(edits, options)]):
            yield self

    @contextmanager
    def _opened(self, blocks: Sequence[Block]) -> Iterator[None]:
        with self._lock:
            mine = [_Open(self._key, block) for block in blocks]
            _OPEN.set((*_still_open(), *mine))
            try:
                yield
            finally:  # only its own: blocks may end in a different order than they began, and in another thread
                for one in mine:
                    one.ended = True
                _OPEN.set(_still_open())

    @contextmanager
    def unsteered(self) -> Iterator[Any]:
        """Inside the block this model computes without the edits that are active around it: in a callback of `generate`, say, to
        read what has been generated so far. New `steer` blocks inside apply."""
        with self._lock:
            mine, reported = tuple(one for one in _still_open() if one.key is self._key), self.last_report
            _OPEN.set(tuple(one for one in _still_open() if one.key is not self._key))
            try:
                yield self
            finally:
                _OPEN.set((*mine, *_still_open()))
                self.last_report = reported

    @property
    def _blocks(self) -> tuple[Block, ...]:
        return tuple(one.block for one in _still_open() if one.key is self._key)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The active edits: those of the enclosing `steer` blocks."""
        return tuple(edit for block in self._blocks for edit in block.steering.edits)

    def run_with_edit(self, text_or_ids: Prompt, edits: Edit | Sequence[Edit]) -> Float[Tensor, "batch seq vocab"]:
        """Logits with these edits, on top of those already active."""
        with self.steer(*(edits if isinstance(edits, Sequence) else [edits])):
            return self.logits(text_or_ids)

    @contextmanager
    def _reported(self, generating: bool) -> Iterator[None]:
        """One call of the model: afterwards its edits are reported. Raises `SteeringError` if a block applied nowhere."""
        around, self._tallies = self._tallies, {}
        try:
            yield
            tallies = list(self._tallies.values())
        finally:
            self._tallies = around  # a callback may have called the model in the middle of a text
        if tallies:
            self.last_report = tuple(tally.report() for tally in tallies)
            check_applied(tallies, generating)

    def _pass(
        self,
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
        n_prompt: Int[Tensor, " batch"] | None = None,
        blocks: Sequence[Block] | None = None,
    ) -> Pass | None:
        """These blocks, or the open ones, in a forward pass over these tokens; None without any. Without `n_prompt` all tokens
        are the prompt's."""
        blocks, tallies = (self._blocks, self._tallies) if blocks is None else (blocks, {})
        if not blocks:
            return None
        special = torch.tensor(self.special_ids, dtype=ids.dtype, device=ids.device)
        n_prompt = positions.amax(1) + 1 if n_prompt is None else n_prompt.to(positions.device)
        return Pass(blocks, Tokens(positions, n_prompt, torch.isin(ids, special)), tallies)

    def _checked(self, steering: Steering) -> Steering:
        """The block's edits, at each of their hooks. Raises `ValueError` for what cannot be applied."""
        steering = replace(steering, edits=at_each_hook(steering.edits))
        for edit in steering.edits:
            self._check_edit(edit)
        refuse_conflicts([*self.edits, *steering.edits])
        order = list(self.backend.hook_places)
        if steering.gate is not None:
            gate = steering.gate
            if gate.hook_name not in order:
                raise unknown_hook(gate.hook_name, self.hook_names, f"the hooks of {self.name} that a gate can read")
            late = [edit for edit in steering.edits if order.index(edit.hook_name) < order.index(gate.hook_name)]
            if late:
                raise ValueError(
                    f"The gate reads {gate.hook_name}, which comes after {late[0]!r}: it must read that hook or an earlier one."
                )
        return steering

    def _check_edit(self, edit: Any) -> None:
        if not isinstance(getattr(edit, "hook_name", None), str) or not callable(getattr(edit, "apply", None)):
            raise ValueError(
                f"steer needs edits, such as `feature * 2.0` or `direction * 4.0`; it got a {type(edit).__name__}, which lacks a "
                f"hook_name or apply(x, positions): {repr(edit)[:80]}."
            )
        if edit.hook_name not in self.backend.hook_places:
            raise unknown_hook(edit.hook_name, self.hook_names, f"the editable hooks of {self.name}")
        width, d_in = getattr(edit, "d_in", None), self.d_in(edit.hook_name)
        if width is not None and width != d_in:
            raise ValueError(
                f"The edit is made for activations of width {width}, but {edit.hook_name} of {self.name} has width "
                f"{d_in}. Use an SAE or vector that belongs to this hook."
            )


def _still_open() -> tuple[_Open, ...]:
    return tuple(one for one in _OPEN.get() if not one.ended)


def _steerings(edits: Sequence[Any], options: dict[str, Any]) -> list[Steering]:
    """The edits as one block, after the plans among them. Raises `ValueError` for a plan beside options: it has its own."""
    plans = [edit for edit in edits if isinstance(edit, Steering)]
    rest = [edit for edit in edits if not isinstance(edit, Steering)]
    given = [name for name, value in options.items() if not _is_default(value)]
    if plans and given:
        raise ValueError(f"{', '.join(given)}: a plan has these options itself; give them to Plan(...) instead.")
    if given and not rest:
        raise ValueError(f"{', '.join(given)}: there is no edit that this could hold for.")
    return [*plans, *([Steering(tuple(rest), **options)] if rest else [])]


def _is_default(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str) and value == "both")
