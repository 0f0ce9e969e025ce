"""Chooses the feature that the demo steers with: one with a readable effect, at a strength that keeps the text fluent.

Candidates fire on 1e-4 to 1e-2 of the tokens and promote everyday words. Each is tried at several strengths on a short text
and scored twice: by the rise in log-probability of its words (in nats, mean over the text), and by the log-probability of
the text under the unsteered model. The largest rise wins among texts that stay nearly as likely as the model's own and do
not repeat themselves.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from saelab.features.feature import Feature
    from saelab.features.store import FeatureStore
    from saelab.models import LanguageModel

STRENGTHS = (1.0, 1.5)
_CANDIDATES = 4
_WORDS = 6
_EVERYDAY = 3  # minimum count of a word in the texts the features were collected on
_MAX_LOSS = 1.0  # nats per token by which the text may be less likely than the model's own
_MIN_DISTINCT = 0.85  # fraction of distinct bigrams; below this the text repeats itself


class Trial(NamedTuple):
    """A feature at one strength and its effect on a text."""

    feature: Feature
    strength: float
    rise: float
    """Rise in log-probability of the feature's words, in nats, mean over the tokens."""
    log_prob: float
    """Mean log-probability of the generated tokens under the unsteered model."""
    distinct: float


def choose_steering(lm: LanguageModel, store: FeatureStore, prompt: str, n_tokens: int) -> Trial | None:
    """The trial to show; None when no feature fired."""
    candidates = _candidates(lm, store)
    unsteered = lm.generate_ids(prompt, n_tokens)
    floor = _mean_log_prob(lm, unsteered.ids, unsteered.n_prompt) - _MAX_LOSS
    trials = [_try(lm, feature, strength, prompt, n_tokens) for feature in candidates for strength in STRENGTHS]
    good = [trial for trial in trials if trial.log_prob >= floor and trial.distinct >= _MIN_DISTINCT]
    if good:
        return max(good, key=lambda trial: trial.rise)
    return max(trials, key=lambda trial: trial.log_prob, default=None)


def _candidates(lm: LanguageModel, store: FeatureStore) -> list[Feature]:
    """Features that mostly promote everyday words, strongest push on a logit first; if there are none, any that fired."""
    rows = store.table(sort="p99", where={"density": (1e-4, 1e-2)}, limit=store.d_sae)
    counts = Counter(int(token) for i in range(store.manifest["n_sequences"]) for token in store.sequence(i))
    found: list[Feature] = []
    features = [store.feature(row["feature"]) for row in rows]
    for feature in sorted(features, key=_push, reverse=True):
        words = [word for word, _ in feature.dominant_logits.positive[:_WORDS] if re.fullmatch(r" [A-Za-z]{4,}", word)]
        everyday = sum(counts[int(lm.to_ids(word)[0, -1])] >= _EVERYDAY for word in words)
        if everyday > _WORDS / 2:
            found.append(feature)
        if len(found) == _CANDIDATES:
            break
    rows = store.table(sort="p99", where={"n_fired": (1, None)}, limit=1)
    return found or [store.feature(row["feature"]) for row in rows]


def _push(feature: Feature) -> float:
    """How much steering with one p99 adds to the logit that the feature raises most."""
    promoted = feature.dominant_logits.positive[:1]
    return (feature.p99 or 0.0) * promoted[0][1] if promoted else 0.0


def _try(lm: LanguageModel, feature: Feature, strength: float, prompt: str, n_tokens: int) -> Trial:
    edit = feature * strength
    with lm.steer(edit):
        steered = lm.generate_ids(prompt, n_tokens)
    ids, start = steered.ids, steered.n_prompt
    words = [lm.to_ids(token)[0, -1] for token, _ in feature.dominant_logits.positive[:_WORDS]]
    rise = 0.0
    if words:
        before, after = lm.logits(ids[None]), lm.run_with_edit(ids[None], edit)
        shares = [x[0, start - 1 : -1].float().log_softmax(-1)[:, torch.stack(words)].mean() for x in (before, after)]
        rise = float(shares[1] - shares[0])
    pairs = list(zip(ids[start:].tolist(), ids[start + 1 :].tolist(), strict=False))
    distinct = len(set(pairs)) / max(len(pairs), 1)
    return Trial(feature, strength, rise, _mean_log_prob(lm, ids, start), distinct)


def _mean_log_prob(lm: LanguageModel, ids: Int[Tensor, " n"], start: int) -> float:
    """Mean log-probability of the tokens from `start` on, in nats, under the model with its current edits."""
    log_probs = lm.logits(ids[None])[0, start - 1 : -1].float().cpu().log_softmax(-1)  # (n - start, vocab)
    return float(log_probs.gather(1, ids[start:, None]).mean())
