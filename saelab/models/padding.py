"""Left padding, and positions given by the caller: passed to the model, after a probe that the model honours them.

Right padding needs no treatment: in a causal model no token sees what comes later.
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
    """Whether the tokens of each row are at 0, 1, 2, ... and padding is only on the right, as a model assumes by default."""
    if positions is None:
        return True
    real, counted = positions >= 0, torch.arange(positions.shape[1], device=positions.device)
    behind = bool((real[:, 1:] <= real[:, :-1]).all())
    return behind and bool(((positions == counted) | ~real).all())


def arguments(model: Any, positions: Int[Tensor, "batch seq"], past: int = 0) -> dict[str, Tensor]:
    """Forward arguments for these positions, of which `past` are in the KV cache."""
    told = {"attention_mask": (positions >= 0).long()}
    return told | ({"position_ids": positions[:, past:].clamp_min(0)} if takes(model, "position_ids") else {})


def refuse_unless(honours: bool, model: Any, positions: Int[Tensor, "batch seq"]) -> None:
    """Raises `ModelError` for positions that the model does not honour."""
    name, real = type(model).__name__, positions >= 0
    if not honours:
        raise ModelError(
            f"{name} reads padding in front of tokens as if it were tokens: pad on the right, or give one prompt at a time."
        )
    from_mask = torch.where(real, real.long().cumsum(1) - 1, -1)
    if not takes(model, "position_ids") and not torch.equal(from_mask, positions):
        raise ModelError(f"{name} numbers positions itself, from 0 at the first token: omit positions.")


N_TRIED = 16
_FRONT = 11  # at most this many tokens of the probe's second row are padding
_SHARE = 0.05  # tolerance, as a fraction of the change from padding that is read as tokens


def honours_padding(model: Any, forward: Forward, ids: Int[Tensor, "1 n"], has_cache: bool) -> bool:
    """Probe whether a row padded on the left has the same logits as on its own, with a KV cache too.

    In half precision rounding changes logits as well, but by far less than padding that is read as tokens.
    """
    if not takes(model, "attention_mask"):
        return False
    n, front = torch.arange(ids.shape[1], device=ids.device), min(_FRONT, ids.shape[1] // 2)
    both, positions = ids.expand(2, -1), torch.stack([n, (n - front).clamp_min(-1)])
    padded, bare = forward(ids, None, False)[0][:, -1], forward(ids[:, front:], None, False)[0][:, -1]
    expected = torch.cat([padded, bare])
    read = float((padded - bare).abs().max())
    allowed = min(tolerance(expected), max(_SHARE * read, tolerance(expected) / 4))
    try:
        found = [forward(both, None, False, **arguments(model, positions))[0][:, -1]]
        if has_cache:
            past = ids.shape[1] - 1
            cache = forward(both[:, :past], None, True, **arguments(model, positions[:, :past]))[1]
            found.append(forward(both[:, past:], cache, True, **arguments(model, positions, past))[0][:, -1])
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return all(float((one - expected).abs().max()) <= allowed for one in found)
