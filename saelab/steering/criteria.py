"""What else could tell which features steer, without generating a text: measured beside read-back, to see what predicts it.

One forward pass of each prompt with the feature added, compared with the unsteered one, at the prompt's last token:

- `output_score`, after Arad et al. (arXiv 2505.20063): the largest p(t) (1 - rank(t) / vocabulary) among the tokens t that the
  decoder row promotes most (logit lens), steered minus unsteered;
- `confidence_change`, after "Does higher interpretability imply better utility?" (arXiv 2510.03659): token confidence is the mean
  of -log p over the 10 likeliest next tokens (larger where one token takes all), steered minus unsteered.

Both are means over the prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.models import LanguageModel
from saelab.steering.plan import Plan

_N_CONFIDENCE = 10


class Criteria(NamedTuple):
    """Of one feature."""

    output_score: float | None
    """None off the residual stream, where a decoder row has no logits."""
    confidence_change: float


def next_token_criteria(
    store: Any, lm: LanguageModel, choices: Sequence[tuple[int, float]], prompts: Sequence[str]
) -> list[Criteria]:
    """The criteria of each (feature, strength in p99), in one batch per prompt."""
    features = [store.feature(feature) for feature, _ in choices]
    arms = [Plan((one.handle * strength,)) for one, (_, strength) in zip(features, choices, strict=True)]
    promoted = [promoted_ids(store, one.feature, one.sign) for one in features]
    scores: list[list[float]] = [[] for _ in choices]
    changes: list[list[float]] = [[] for _ in choices]
    for prompt in prompts:
        unsteered, *steered = [
            _log_probs(one) for (one,) in lm.generate_arms(prompt, [None, *arms], 1, keep_logits=True)
        ]
        for i, log_probs in enumerate(steered):
            changes[i].append(_confidence(log_probs) - _confidence(unsteered))
            if promoted[i]:
                scores[i].append(_ranked(log_probs, promoted[i]) - _ranked(unsteered, promoted[i]))
    return [
        Criteria(_mean(score) if score else None, _mean(change)) for score, change in zip(scores, changes, strict=True)
    ]


def promoted_ids(store: Any, feature: int, sign: int | None) -> list[int]:
    """The tokens that one unit along the decoder row promotes most, at the dominant end; [] off the residual stream."""
    found = store.arrays(feature, "logits").get(f"{'negative' if sign == -1 else 'positive'}_ids")
    return [] if found is None else [int(token) for token in found]


def _log_probs(one: Any) -> Float[Tensor, " vocab"]:
    return one.logits[0].log_softmax(-1)


def _confidence(log_probs: Float[Tensor, " vocab"]) -> float:
    return -float(log_probs.topk(min(_N_CONFIDENCE, len(log_probs))).values.mean())


def _ranked(log_probs: Float[Tensor, " vocab"], tokens: Sequence[int]) -> float:
    """The largest probability of the tokens, each weighted by its rank from 1 (the likeliest token) down to 0."""
    chosen = log_probs[torch.tensor(tokens)]  # (n_tokens)
    ranks = (log_probs[None] > chosen[:, None]).sum(1)
    return float((chosen.exp() * (1 - ranks / len(log_probs))).max())


def rank_correlation(a: Sequence[float | None], b: Sequence[float | None]) -> float | None:
    """Spearman's rank correlation over the pairs in which both are known; None for fewer than 3 pairs, or where all are equal."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if len(pairs) < 3:
        return None
    ranks = [_ranks(np.array(side, dtype=np.float64)) for side in zip(*pairs, strict=True)]
    centred = [one - one.mean() for one in ranks]
    size = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / size if size else None


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean rank."""
    found, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts) + (last - 1))[inverse.reshape(-1)] / 2


def rank_correlations(
    criteria: Mapping[str, Sequence[float | None]], outcomes: Mapping[str, Sequence[float | None]]
) -> dict[str, dict[str, float | None]]:
    """Of every criterion with every outcome."""
    return {
        name: {outcome: rank_correlation(values, reached) for outcome, reached in outcomes.items()}
        for name, values in criteria.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
