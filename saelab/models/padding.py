"""Padding in front of tokens, and positions of the caller's: told to the model, which is tried to see whether it keeps to them.

Padding behind the tokens of a row needs no word: no token of a causal model sees what comes later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.errors import ModelError
from saelab.models.families import takes, tolerance

Forward = Callable[..., tuple[Tensor, Any]]
"""(ids, KV cache or None, with_cache, **arguments) -> logits (batch, seq, vocab), cache."""


def is_plain(positions: Int[Tensor, "batch seq"] | None) -> bool:
    """Whether the tokens of each row stand at 0, 1, 2 ... and padding only behind them: what a model takes for granted."""
    if positions is None:
        return True
    real, counted = positions >= 0, torch.arange(positions.shape[1], device=positions.device)
    behind = bool((real[:, 1:] <= real[:, :-1]).all())
    return behind and bool(((positions == counted) | ~real).all())


def arguments(model: Any, positions: Int[Tensor, "batch seq"], past: int = 0) -> dict[str, Tensor]:
    """What a forward pass is told of positions; `past` of them are in its KV cache."""
    told = {"attention_mask": (positions >= 0).long()}
    return told | ({"position_ids": positions[:, past:].clamp_min(0)} if takes(model, "position_ids") else {})


def refuse_unless(honours: bool, model: Any, positions: Int[Tensor, "batch seq"]) -> None:
    """Raises `ModelError` for positions that the model does not keep to."""
    name, real = type(model).__name__, positions >= 0
    if not honours:
        raise ModelError(
            f"{name} reads padding in front of tokens as if it were tokens: put the padding behind them, or give one prompt at "
            "a time."
        )
    from_mask = torch.where(real, real.long().cumsum(1) - 1, -1)
    if not takes(model, "position_ids") and not torch.equal(from_mask, positions):
        raise ModelError(f"{name} counts positions by itself, from 0 at the first token: leave positions out.")


def honours_padding(model: Any, forward: Forward, ids: Int[Tensor, "1 5"], has_cache: bool) -> bool:
    """Whether a row with padding in front has the logits that it has alone, with a KV cache too: it is tried."""
    if not takes(model, "attention_mask"):
        return False
    n = torch.arange(5, device=ids.device)
    both, positions = ids.expand(2, -1), torch.stack([n, (n - 2).clamp_min(-1)])
    whole, alone = forward(ids, None, False)[0][:, -1], forward(ids[:, 2:], None, False)[0][:, -1]
    expected = torch.cat([whole, alone])
    try:
        found = [forward(both, None, False, **arguments(model, positions))[0][:, -1]]
        if has_cache:
            cache = forward(both[:, :4], None, True, **arguments(model, positions[:, :4]))[1]
            found.append(forward(both[:, 4:], cache, True, **arguments(model, positions, 4))[0][:, -1])
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return all(float((one - expected).abs().max()) <= tolerance(expected) for one in found)
