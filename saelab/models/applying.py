"""Edits at a hook during a forward pass: where they apply, the sum of their changes, limits, and the count of what changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.models.applied import Tally
from saelab.models.steered import Steering, Tokens


class Block(NamedTuple):
    """One `lm.steer` block that is open."""

    steering: Steering
    rows: tuple[int, ...] | None = None
    """Sequences of the batch that it steers; None: all."""


class Pass:
    """The blocks in one forward pass: their edits by hook, and what their gates said."""

    def __init__(self, blocks: Sequence[Block], tokens: Tokens | None, tallies: dict[Any, Tally]) -> None:
        self.blocks, self.tokens, self.tallies = blocks, tokens, tallies
        self._open: dict[int, Bool[Tensor, "batch seq"]] = {}

    @property
    def hook_names(self) -> dict[str, None]:
        """The hooks that are edited or that a gate reads."""
        gates = [block.steering.gate.hook_name for block in self.blocks if block.steering.gate is not None]
        return dict.fromkeys([*gates, *(edit.hook_name for block in self.blocks for edit in block.steering.edits)])

    def at(self, hook_name: str) -> Callable[[Tensor], Tensor]:
        """What edits the activations at a hook."""

        def edited(x: Tensor) -> Tensor:
            flat = rearrange(x, "batch position ... -> batch position (...)")  # a bridge has a separate axis for heads
            for i, block in enumerate(self.blocks):
                gate = block.steering.gate
                if gate is not None and gate.hook_name == hook_name:
                    self._open[i] = gate.is_open(flat)
            results = [self._of_block(i, hook_name, flat) for i in range(len(self.blocks))]
            results = [result for result in results if result is not flat]
            if not results:
                return x
            return (results[0] if len(results) == 1 else sum_of_changes(flat, results)).reshape(x.shape)

        return edited

    def _of_block(self, i: int, hook_name: str, x: Float[Tensor, "batch seq d_in"]) -> Tensor:
        """`x` under the edits of one block; `x` itself when nothing changes."""
        block, tokens = self.blocks[i], self.tokens
        edits = [edit for edit in block.steering.edits if edit.hook_name == hook_name]
        if not edits:
            return x
        assert tokens is not None, "edits need the positions of the tokens"
        here = self._selected(i, block, tokens)
        positions = tokens.positions.masked_fill(~here, -1)
        known: dict[Any, Any] = {}
        results = [_result(edit, x, positions, known) for edit in edits]
        results = [result for result in results if result is not x]
        result, capped = x, None
        if results:
            result = results[0] if len(results) == 1 else sum_of_changes(x, results)
            if block.steering.is_bounded:
                result, capped = _limited(x, result, block.steering)
        tally = self.tallies.setdefault((id(block), hook_name), Tally(hook_name, block.steering, edits))
        behind = tokens.positions > 0
        in_phase = block.steering.in_phase(tokens) & behind
        tally.count(x, result, tokens.positions >= 0, in_phase, here & behind, capped)
        return result

    def _selected(self, i: int, block: Block, tokens: Tokens) -> Bool[Tensor, "batch seq"]:
        here = block.steering.selected(tokens)
        if block.rows is not None:
            rows = torch.zeros(len(here), dtype=torch.bool, device=here.device)
            rows[list(block.rows)] = True
            here = here & rows[:, None]
        return here if block.steering.gate is None else here & self._open[i]


def _result(edit: Any, x: Tensor, positions: Tensor, known: dict[Any, Any]) -> Tensor:
    """What the edit makes of the tokens that are its own; `x` itself where it changes nothing. In `known` edits share what they
    compute from the same `x` and `positions`, such as the feature activations of their SAE."""
    copy = x.clone()  # an edit may write into it
    shares = getattr(edit, "apply_knowing", None)
    result = edit.apply(copy, positions) if shares is None else shares(copy, positions, known)
    if not isinstance(result, Tensor) or result.shape != x.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"{edit!r} at {edit.hook_name!r} returned {got}, expected a tensor of {tuple(x.shape)}.")
    if result is copy and torch.equal(copy, x):
        return x
    here = positions >= 0 if getattr(edit, "first_token", False) else positions > 0
    return torch.where(here[..., None], result.to(x.dtype), x)


def sum_of_changes(x: Tensor, results: list[Tensor]) -> Tensor:
    """x plus the changes that each result makes to the same x, in fp32; tokens that none changes stay bit-identical."""
    wide = torch.promote_types(x.dtype, torch.float32)
    change = torch.stack([result.to(wide) - x.to(wide) for result in results]).sum(0)
    changed = (change != 0).any(-1, keepdim=True)
    return torch.where(changed, (x.to(wide) + change).to(x.dtype), x)


def _limited(x: Tensor, result: Tensor, steering: Steering) -> tuple[Tensor, Bool[Tensor, "batch seq"] | None]:
    """The result within `cap` and at the norm that `keep_norm` keeps, and the tokens that were capped."""
    wide = torch.float64  # the square of a large change overflows fp32
    before, change, capped = x.to(wide), result.to(wide) - x.to(wide), None
    changed = (change != 0).any(-1, keepdim=True)
    norm = before.norm(dim=-1, keepdim=True)
    if steering.cap is not None:
        size, most = change.norm(dim=-1, keepdim=True), steering.cap * norm
        capped = (size > most).squeeze(-1)
        change = torch.where(size > most, change * (most / size), change)
    after = before + change
    if steering.keep_norm:
        size = after.norm(dim=-1, keepdim=True)
        after = torch.where(size > 0, after * (norm / size), after)
    return torch.where(changed, after.to(x.dtype), x), capped
