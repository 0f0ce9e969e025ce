"""Writing text with a language model, one token at a time: the loop and the choice of the next token."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

OnToken = Callable[[int], None]
"""Called with the number of tokens written so far; what it raises ends the generation."""


class Generation(NamedTuple):
    """Token ids of a prompt and what was written after it."""

    ids: Int[Tensor, " n_tokens"]
    """Prompt and continuation."""
    n_prompt: int
    """How many of `ids` are the prompt."""
    logits: Float[Tensor, "n_steps vocab"] | None
    """The logits each new token was chosen from, fp32 on the CPU, when they were asked for."""


def sample(
    step: Callable[[Tensor, Any], tuple[Tensor, Any]],
    prompt: Int[Tensor, "1 seq"],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_ids: Collection[int],
    keep_logits: bool = False,
    on_token: OnToken | None = None,
) -> Generation:
    """Extend `prompt` until a stop token or `max_new_tokens`; `step(all ids, cache)` gives last logits and cache.

    `on_token` is told after each.

    One uniform number is drawn for every token from a generator of `seed`, whatever the logits are: two runs on one
    seed, steered and not, meet the same luck.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, cache, kept = prompt, None, []
    for n in range(1, max_new_tokens + 1):
        logits, cache = step(ids, cache)
        logits = logits.float().cpu()
        if keep_logits:
            kept.append(logits)
        uniform = torch.rand((), generator=generator, dtype=torch.float64)
        token = choose(logits, temperature, uniform)
        ids = torch.cat([ids, torch.tensor([[token]], device=ids.device)], dim=1)  # (1, seq + 1)
        if on_token is not None:
            on_token(n)
        if token in stop_ids:
            break
    return Generation(ids[0].cpu(), prompt.shape[1], torch.stack(kept) if kept else None)


def choose(logits: Float[Tensor, " vocab"], temperature: float, uniform: Float[Tensor, ""]) -> int:
    """The most likely token at temperature 0, else the one at `uniform` of the cumulated probabilities."""
    if temperature == 0:
        return int(logits.argmax())
    cumulated = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
    return int(torch.searchsorted(cumulated, uniform * cumulated[-1], right=True).clamp(max=len(logits) - 1))


def check_generation(
    ids: Int[Tensor, "batch seq"], max_new_tokens: int, temperature: float, max_ctx: int, name: str
) -> None:
    """Raises `ValueError` for a request to generate that cannot be met, naming the value and the limit."""
    if ids.shape[0] != 1:
        raise ValueError(f"generate takes one prompt, got {ids.shape[0]}; call it once for each.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; expected at least 1.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}; expected 0 (most likely token) or a positive number.")
    if ids.shape[1] + max_new_tokens > max_ctx:
        raise ValueError(
            f"{ids.shape[1]} prompt tokens and max_new_tokens={max_new_tokens} exceed the context of {name}, {max_ctx} "
            f"tokens; ask for at most {max(0, max_ctx - ids.shape[1])}."
        )
