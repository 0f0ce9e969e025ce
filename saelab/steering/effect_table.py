"""Tests whether steering with a feature promotes the tokens its logits predict, against random directions of equal norm."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from saelab.edits.feature_handle import FeatureHandle
from saelab.models import Edit, LanguageModel
from saelab.models.hooks import writes_to_residual
from saelab.models.prompts import several
from saelab.steering.control import along

NEUTRAL_PROMPTS = (
    "The weather today is",
    "When I opened the door, I saw",
    "The most important thing about this is",
    "She looked at the table and said",
    "In the middle of the city there is",
    "My friend told me that",
    "After the meeting we decided to",
    "The book on the shelf was about",
    "He walked down the street and",
    "On the other side of the room",
    "It was early in the morning when",
    "They have been working on",
    "The first thing you should know is",
    "We could not find the",
    "There is a simple reason for",
    "The old man picked up the",
    "Yesterday I went to the",
    "What I like most is",
    "At the end of the day,",
    "The letter began with the words",
)
DENSITY = (1e-4, 1e-2)
"""Range of densities from which features of a store are drawn."""
N_PROMOTED = 10


class Effect(NamedTuple):
    """The effect of steering with one feature: the rise in mean log-probability of the tokens it promotes, in nats."""

    feature: int
    promoted: tuple[str, ...]
    """The tokens with the largest logits along its decoder row (along minus the row if its dominant end is negative)."""
    rise: float
    random_mean: float
    """Mean rise with random directions of the same norm."""
    random_max: float

    @property
    def beats_mean(self) -> bool:
        return self.rise > self.random_mean

    @property
    def beats_max(self) -> bool:
        return self.rise > self.random_max


class EffectTable(NamedTuple):
    """The measured effects and the settings they were measured with."""

    rows: tuple[Effect, ...]
    strength: float
    n_prompts: int
    n_random: int

    @property
    def failures(self) -> list[int]:
        """Features whose rise is not above the mean of the random directions."""
        return [row.feature for row in self.rows if not row.beats_mean]

    def show(self, console: Console | None = None) -> None:
        """Print the table, both comparisons, and the failing features."""
        console = console or Console()
        table = Table(
            title=f"+{self.strength:g} p99 on {self.n_prompts} prompts: rise in mean log-probability (last position) "
            f"of the top {N_PROMOTED} logit tokens, against {self.n_random} random directions of equal norm"
        )
        for name in ("feature", "promotes", "rise", "random mean", "random max", "> mean", "> max"):
            table.add_column(name, justify="left" if name == "promotes" else "right")
        for row in self.rows:
            words = escape(" ".join(map(repr, row.promoted[:4])))
            numbers = [f"{number:+.3f}" for number in (row.rise, row.random_mean, row.random_max)]
            verdicts = ["yes" if won else "NO" for won in (row.beats_mean, row.beats_max)]
            table.add_row(str(row.feature), words, *numbers, *verdicts)
        console.print(table)
        over = sum(row.beats_mean for row in self.rows), sum(row.beats_max for row in self.rows)
        console.print(
            f"Above the mean: {over[0]} of {len(self.rows)}; above the maximum: {over[1]} of {len(self.rows)}."
        )
        names = ", ".join(map(str, self.failures)) or "none"
        console.print(f"Failures (not above the mean): {names}.")


def effect_table(
    lm: LanguageModel,
    store_or_handles: Any,
    prompts: Any = NEUTRAL_PROMPTS,
    n_features: int = 10,
    n_random: int = 20,
    strength: float = 2.0,
    seed: int = 0,
    show: bool = True,
) -> EffectTable:
    """Steer `lm` on `prompts` with `strength` times the p99 of each feature, and with random directions of the same norm.

    From a feature store, `n_features` features with a density in `DENSITY` are drawn with `seed`; a list of features (or
    `FeatureHandle`s) is used as given. Raises `ValueError` for a hook that does not write to the residual stream, where a
    decoder row has no logits, and when a store has too few such features.
    """
    handles = _handles(store_or_handles, n_features, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = lm.logit_weights().cpu()
    prompts = list(several(prompts, "prompts"))
    ids, positions = lm.to_batch(prompts)
    last = (positions >= 0).sum(1) - 1  # (n_prompts)

    def log_probs(edit: Edit | None) -> Float[Tensor, "n_prompts vocab"]:
        with lm.steer(*([edit] if edit is not None else [])):
            logits = lm.logits(ids, positions=positions)
        return torch.log_softmax(logits[torch.arange(len(last)), last.to(logits.device)].float(), dim=-1).cpu()

    before = log_probs(None)
    rows = [_effect(lm, handle, weights, before, log_probs, strength, n_random, generator) for handle in handles]
    table = EffectTable(tuple(rows), strength, len(prompts), n_random)
    if show:
        table.show()
    return table


def _effect(
    lm: LanguageModel,
    handle: FeatureHandle,
    weights: Float[Tensor, "vocab d_model"],
    before: Float[Tensor, "n_prompts vocab"],
    log_probs: Any,
    strength: float,
    n_random: int,
    generator: torch.Generator,
) -> Effect:
    row = handle.sae.decoder(handle.source)[0][handle.feature].detach().float().cpu()
    if not writes_to_residual(handle.hook_name) or len(row) != weights.shape[1]:
        raise ValueError(
            f"{handle.hook_name} does not write to the residual stream, so its features have no logits to compare with."
        )
    unit = handle.unit("p99")
    promoted = (weights @ row * math.copysign(1.0, unit)).topk(N_PROMOTED).indices

    def rise(edit: Edit) -> float:
        return float((log_probs(edit) - before)[:, promoted].mean())

    steered = handle * strength
    randoms = [rise(along(steered, torch.randn(len(row), generator=generator))) for _ in range(n_random)]
    words = [str(token) if lm.tokenizer is None else lm.tokenizer.decode([int(token)]) for token in promoted]
    return Effect(handle.feature, tuple(words), rise(steered), sum(randoms) / len(randoms), max(randoms))


def _handles(store_or_handles: Any, n_features: int, seed: int) -> list[FeatureHandle]:
    """Handles of the features to test: drawn from a store with `seed`, or those given."""
    if not hasattr(store_or_handles, "table"):
        return [getattr(feature, "handle", feature) for feature in store_or_handles]
    store = store_or_handles
    rows = store.table(sort="feature", descending=False, where={"density": DENSITY}, limit=len(store))
    found = [row["feature"] for row in rows]
    if len(found) < n_features:
        raise ValueError(
            f"The store has {len(found)} features with a density of {DENSITY[0]:g} to {DENSITY[1]:g}, but n_features="
            f"{n_features}; ask for fewer, or collect features on more tokens."
        )
    drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:n_features]
    return [store.feature(found[i]).handle for i in sorted(drawn.tolist())]
