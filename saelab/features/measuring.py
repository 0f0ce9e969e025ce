"""Measures what a feature does: the model runs over the feature's strongest examples with and without it.

The feature is zeroed on every token of the context, by the edit `feature.ablate()`: the reconstruction error of the SAE and all
other features stay. Scored are the predictions at the peak and at up to 15 tokens after it, in the same document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.activation_cache.checks import refuse_steered
from saelab.errors import SaelabError
from saelab.evaluation.loss_recovered import MAX_LOGITS
from saelab.features.collected_with import steered_model
from saelab.features.effect import Estimate, MeasuredEffect, TokenChange, not_measurable
from saelab.features.records import Example
from saelab.features.token_text import token_bytes
from saelab.models import Edit, LanguageModel

N_SCORED = 16
"""Tokens of an example whose predictions are scored, at most."""
N_TOKENS = 10
"""Tokens named on each side."""
MIN_PROBABILITY = 1e-4
"""Tokens of a mean probability below this, with and without the feature, are not named: their log-probabilities move most, and
matter least."""
_RESAMPLES = 2000


class _Case(NamedTuple):
    """An example to score."""

    ids: Int[Tensor, " ctx_len"]
    """Its context."""
    peak: int
    stop: int
    """The last token that is predicted is the one before."""


class _Scored(NamedTuple):
    """One example with and without the feature."""

    n_tokens: int
    loss: float
    kl: float
    change: Float[Tensor, " vocab"]
    """Of the log-probability of each token, the mean over the scored predictions; next, the mean probabilities."""
    before: Float[Tensor, " vocab"]
    after: Float[Tensor, " vocab"]


@torch.inference_mode()
def measure_effect(
    feature: Any, lm: Any, n_examples: int | None = None, *, on_example: Callable[[int, int], Any] | None = None
) -> MeasuredEffect:
    """Zero a `Feature` at its strongest examples (all that are stored, or `n_examples` of them).

    `on_example(done, all)` is called after each. Raises `ValueError` for a model other than the one of the store or one that is
    being steered, and for an SAE whose features cannot be zeroed at one hook; `SaelabError` for a feature without examples.
    """
    store = feature.store
    if reason := not_measurable(store.manifest):
        raise ValueError(f"Feature {feature.feature}: {reason}")
    refuse_steered(lm := steered_model(store, lm))
    examples = feature.examples(n_examples)
    cases = [case for one in examples if (case := _case(store, one)) is not None]
    if not cases:
        raise SaelabError(
            f"Feature {feature.feature} has no example that is followed by a token: nothing can be measured."
        )
    handle, scored, control = feature.handle, [], 0.0
    for batch in _batches(cases, lm.d_vocab):
        ids = torch.stack([case.ids for case in batch])[:, : max(case.stop for case in batch)]
        before, after = (
            lm.logits(ids) if edit is None else lm.run_with_edit(ids, edit) for edit in (None, handle.ablate())
        )
        if not scored:
            control = _control(lm, ids, batch, before, handle.scale(1.0))
        for row, case in enumerate(batch):
            scored.append(_score(case, before[row], after[row]))
            if on_example is not None:
                on_example(len(scored), len(cases))
    return _summarised(scored, lm.tokenizer, control)


def _case(store: Any, example: Example) -> _Case | None:
    """The example with the tokens to score; None where no token of its document follows the peak in its context."""
    context, peak = example.where
    docs = store.context_documents(context)[peak : peak + N_SCORED + 1]
    n = int(np.argmin(docs == example.document)) or len(docs)  # up to the first token of another document
    return _Case(torch.from_numpy(store.sequence(context).astype(np.int64)), peak, peak + n) if n > 1 else None


def _batches(cases: list[_Case], d_vocab: int) -> Iterator[list[_Case]]:
    """As many examples at once as a forward pass may hold logits of."""
    size = max(1, MAX_LOGITS // (max(case.stop for case in cases) * d_vocab))
    return (cases[first : first + size] for first in range(0, len(cases), size))


def _log_probs(case: _Case, logits: Float[Tensor, "seq vocab"]) -> Float[Tensor, "n_scored vocab"]:
    return logits[case.peak : case.stop - 1].float().log_softmax(-1)


def _score(case: _Case, before: Float[Tensor, "seq vocab"], after: Float[Tensor, "seq vocab"]) -> _Scored:
    log_p, log_q = _log_probs(case, before), _log_probs(case, after)
    targets = case.ids[case.peak + 1 : case.stop].to(log_p.device)
    loss = (log_p - log_q).gather(1, targets[:, None]).double().mean()
    kl = (log_p.exp() * (log_p - log_q)).sum(1).double().mean()
    means = [values.mean(0).cpu() for values in (log_q - log_p, log_p.exp(), log_q.exp())]
    return _Scored(len(targets), float(loss), float(kl), *means)


def _control(lm: LanguageModel, ids: Tensor, batch: list[_Case], before: Tensor, nothing: Edit) -> float:
    """The largest change of a scored log-probability by an edit that leaves the feature as it is."""
    again = lm.run_with_edit(ids, nothing)
    return max(
        float((_log_probs(case, again[row]) - _log_probs(case, before[row])).abs().max())
        for row, case in enumerate(batch)
    )


def _summarised(scored: list[_Scored], tokenizer: Any, control: float) -> MeasuredEffect:
    changes = torch.stack([one.change for one in scored])  # (n_examples, vocab)
    before, after = (torch.stack([getattr(one, name) for one in scored]).mean(0) for name in ("before", "after"))
    mean = changes.double().mean(0)
    likely = torch.maximum(before, after) >= MIN_PROBABILITY
    sides = []
    for sign in (-1, 1):
        found = (sign * mean).masked_fill(~likely, -torch.inf).topk(min(N_TOKENS, len(mean)))
        sides.append(found.indices[found.values > 0])
    named = torch.cat(sides).tolist()
    spelled = token_bytes(tokenizer, named)
    rows = {
        index: TokenChange(
            spelled[index].decode("utf-8", "backslashreplace"), estimate(changes[:, index].double().numpy()),
            float(before[index]), float(after[index]),
        )
        for index in named
    }  # fmt: skip
    down, up = (tuple(rows[index] for index in side.tolist()) for side in sides)
    loss, kl = (estimate(np.array([getattr(one, name) for one in scored])) for name in ("loss", "kl"))
    return MeasuredEffect(len(scored), sum(one.n_tokens for one in scored), loss, kl, down, up, control)


def estimate(values: np.ndarray) -> Estimate:
    """The mean of `(n_examples,)` values with its bootstrap interval."""
    if len(values) < 2:
        return Estimate(float(values.mean()), None, None)
    rows = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(values[rows].mean(1), (0.025, 0.975)).tolist()
    return Estimate(float(values.mean()), low, high)
