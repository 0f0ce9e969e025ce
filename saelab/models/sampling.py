"""Sampling from a language model, one token of every prompt at a time: the loop and the choice of the next token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.validation import check_integer

OnToken = Callable[[int], None]
"""Called with the number of tokens generated so far; an exception from it ends the generation."""
OnText = Callable[[str], None]
"""Called with the text so far after each new token; an exception from it ends the generation."""
OnStep = Callable[[int, Tensor, Tensor], bool | None]
"""(number of new tokens, ids so far (batch, seq), -1 on padding and behind the end of a row, the logits (batch, vocab) that the
last was chosen from, in fp32 on the CPU) -> whether to end here; None goes on."""
Step = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]
"""(ids, positions, KV cache) -> logits (batch, vocab) after the last of `ids`, and the cache."""


class Generation(NamedTuple):
    """Token ids of a prompt and its continuation."""

    ids: Int[Tensor, " n_tokens"]
    """Prompt and continuation."""
    n_prompt: int
    """Number of prompt tokens in `ids`."""
    logits: Float[Tensor, "n_steps vocab"] | None
    """The logits each new token was chosen from, fp32 on the CPU, if they were requested."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0
    n_samples: int = 1
    """Continuations per prompt; number j is the one that `seed + j` alone yields."""
    stop_ids: Collection[int] = ()
    keep_logits: bool = False
    seeds: Sequence[int] = ()
    """Their seeds, where these do not count up from `seed`: as many as `n_samples`."""

    @property
    def generators(self) -> list[torch.Generator]:
        """One for each continuation of a prompt."""
        seeds = self.seeds or range(self.seed, self.seed + self.n_samples)
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def check(self, n_prompt: int, max_ctx: int, name: str) -> None:
        """Raises `ValueError` for a request that cannot be met, naming the value and the limit."""
        check_integer("max_new_tokens", self.max_new_tokens, 1)
        check_integer("num_return_sequences", self.n_samples, 1)
        check_integer("seed", self.seed, 0, 2**63 - self.n_samples)
        for seed in self.seeds:
            check_integer("a seed", seed, 0, 2**63 - 1)
        number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if not number or not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r}; expected 0 (most likely token) or a positive number.")
        if self.n_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_return_sequences={self.n_samples} at temperature 0 would be the same text {self.n_samples} times: give a "
                "temperature above 0."
            )
        if n_prompt + self.max_new_tokens > max_ctx:
            raise ValueError(
                f"{n_prompt} prompt tokens and max_new_tokens={self.max_new_tokens} exceed the context of {name}, {max_ctx} "
                f"tokens; ask for at most {max(0, max_ctx - n_prompt)}."
            )


def sample(
    step: Step,
    prompts: Sequence[Int[Tensor, " n_tokens"]],
    how: Sampling,
    check: Callable[[Tensor, int], None],
    on_step: OnStep | None = None,
) -> list[Generation]:
    """Extend every prompt until a stop token or `max_new_tokens`; returns `n_samples` results per prompt, in order.

    Shorter prompts are padded on the left. `check(logits, n)` is called with the logits of the unfinished rows at the n-th
    new token, `on_step(n, ids, logits)` after it. One uniform number per token is drawn from a generator with the seed, whatever
    the logits: runs with the same seed draw the same numbers, steered or not, alone or in a batch.
    """
    rows = [prompt for prompt in prompts for _ in range(how.n_samples)]
    generators = how.generators
    ids, positions = left_padded(rows)
    live, cache, kept = torch.ones(len(rows), dtype=torch.bool), None, []
    n_new = torch.zeros(len(rows), dtype=torch.int64)
    stop = torch.tensor(list(how.stop_ids), dtype=torch.int64)
    for n in range(1, how.max_new_tokens + 1):
        logits, cache = step(ids, positions, cache)
        logits = logits.float().cpu()
        check(logits[live], n)
        kept += [logits] if how.keep_logits else []
        uniforms = [torch.rand((), generator=generator, dtype=torch.float64) for generator in generators]
        chosen = choose(logits, how.temperature, torch.stack(uniforms).repeat(len(prompts)))
        ids, positions = _extended(ids, positions, chosen, live)
        n_new += live
        live &= ~torch.isin(chosen, stop)
        ended = on_step is not None and on_step(n, torch.where(positions >= 0, ids, -1), logits)
        if ended or not bool(live.any()):
            break
    outputs = [row[row_positions >= 0].cpu() for row, row_positions in zip(ids, positions, strict=True)]
    steps = [torch.stack([one[i] for one in kept[: int(n_new[i])]]) if kept else None for i in range(len(rows))]
    return [Generation(out, len(row), logits) for out, row, logits in zip(outputs, rows, steps, strict=True)]


def left_padded(rows: Sequence[Int[Tensor, " n_tokens"]]) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Ids padded on the left to one length, and their positions, -1 on padding."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row[:1].expand(width - len(row)), row]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    positions = torch.arange(width, device=ids.device) - (width - lengths)[:, None]  # (batch, seq)
    return ids, positions.clamp_min(-1)


def _extended(
    ids: Int[Tensor, "batch seq"],
    positions: Int[Tensor, "batch seq"],
    chosen: Int[Tensor, " batch"],
    live: Bool[Tensor, " batch"],
) -> tuple[Int[Tensor, "batch seq+1"], Int[Tensor, "batch seq+1"]]:
    """Ids and positions with one more token in each unfinished row, and padding in those that ended."""
    live, chosen = live.to(ids.device), chosen.to(ids.device)
    following = torch.where(live, positions.max(1).values + 1, -1)
    return torch.cat([ids, chosen[:, None]], 1), torch.cat([positions, following[:, None]], 1)


def choose(
    logits: Float[Tensor, "batch vocab"], temperature: float, uniforms: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The most likely token of each row at temperature 0, else inverse transform sampling: the token whose cumulative
    probability first exceeds the row's uniform number. A row's token does not depend on the other rows."""
    if temperature == 0:
        return logits.argmax(-1)
    below = logits.double() - logits.amax(-1, keepdim=True).double()  # at most 0, so no temperature overflows
    cumulated = torch.softmax(below / temperature, dim=-1).cumsum(-1)
    found = torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)
    return found.squeeze(1).clamp(max=logits.shape[1] - 1)
