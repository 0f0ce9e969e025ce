"""Features of a concept: chosen on one half of the texts, scored on the other half, so that the scores are not inflated by the
choice among all features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.features.intervals import newcombe
from saelab.models import LanguageModel
from saelab.saes import SAE
from saelab.saes.trained_hooks import check_is_sae, hooks_of
from saelab.steering.text_activations import distinct_texts, stream_tokens
from saelab.steering.unsteered import refuse_steered
from saelab.validation import check_integer

MIN_TEXTS = 4
"""Of each side, for two halves of at least two."""
N_BOOTSTRAP = 1000


class ConceptFeature(NamedTuple):
    """One feature. Shares and AUROC of the held-out half, with 95 % intervals for this feature looked at alone."""

    feature: int
    selected_by: float
    """Its score on the half on which it was chosen."""
    share_positive: float
    """Share of texts in which it fires on some counted token."""
    share_negative: float
    difference: float
    """share_positive - share_negative."""
    low: float
    high: float
    """Newcombe's interval of `difference`."""
    auroc: float
    """Probability that its maximum is larger in a positive text than in a negative one, ties counting half."""
    auroc_low: float
    auroc_high: float
    """Percentile bootstrap over the texts of both sides."""
    n_positive: int
    n_negative: int
    """Held-out texts."""


def features_for(
    sae: Any,
    lm: LanguageModel,
    positive: Any,
    negative: Any,
    k: int = 10,
    *,
    by: str = "difference",
    hook_name: str | None = None,
    seed: int = 0,
) -> list[ConceptFeature]:
    """The `k` features that tell `positive` from `negative` texts best, the best first, by their score on one half of the
    texts: the difference of the shares of texts in which they fire, or the AUROC of their maxima. Each row also has both scores
    on the other half, which took no part in the choice.

    A text that comes twice in a side counts once; `seed` draws the halves. Ties go to the larger difference of mean maxima, then
    to the lower number. Position 0 and special tokens do not count. Raises `ValueError` for fewer than 4 different texts a side,
    texts without a counted token, an SAE for another hook or width, a model that is being steered, and a bad `k`, `by` or `seed`.
    """
    check_is_sae(sae, "features_for")
    check_integer("k", k, 1)
    check_integer("seed", seed, 0)
    if by not in ("difference", "auroc"):
        raise ValueError(f"by={by!r} is unknown; expected 'difference' or 'auroc'.")
    refuse_steered(lm)
    sides = []
    for texts, side in ((positive, "positive"), (negative, "negative")):
        distinct = distinct_texts(texts, side)
        if len(distinct) < MIN_TEXTS:
            raise ValueError(f"{side} has {len(distinct)} different texts; features_for needs at least {MIN_TEXTS}.")
        sides.append(text_maxima(sae, lm, distinct, side, hook_name))
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(side), generator=generator) for side in sides]
    chosen_on = [side[order[: len(side) // 2]] for side, order in zip(sides, orders, strict=True)]
    held_out = [side[order[len(side) // 2 :]] for side, order in zip(sides, orders, strict=True)]
    scores = _differences(*chosen_on) if by == "difference" else auroc(*chosen_on)
    means = (chosen_on[0].mean(0) - chosen_on[1].mean(0)).double()
    order = np.lexsort((-means.numpy(), -scores.numpy()))[:k]
    rng = np.random.default_rng(seed)
    return [_scored(int(i), float(scores[i]), held_out[0][:, i], held_out[1][:, i], rng) for i in order]


@torch.no_grad()
def text_maxima(
    sae: SAE, lm: LanguageModel, texts: Sequence[Any], side: str, hook_name: str | None
) -> Float[Tensor, "n_texts d_sae"]:
    """The activation of each feature that is largest in size, over the counted tokens of each text; 0 where it never fires."""
    hooks = hooks_of(sae, hook_name)
    largest, seen = torch.zeros(len(texts), sae.d_sae), torch.zeros(len(texts), dtype=torch.bool)
    for tokens in stream_tokens(lm, texts, hooks.all):
        if not len(tokens.texts):
            continue
        feature_acts = sae.encode(hooks.batch(tokens.x).x.float().to(sae.W_dec.device))
        where = tokens.texts[feature_acts.rows.cpu()] * sae.d_sae + feature_acts.features.cpu()
        values = feature_acts.values.float().cpu()
        for sign, reduce in ((values > 0, "amax"), (values < 0, "amin")):
            one = torch.zeros_like(largest).view(-1)
            one.scatter_reduce_(0, where[sign], values[sign], reduce)
            one = one.view_as(largest)
            largest = torch.where(one.abs() > largest.abs(), one, largest)
        seen[tokens.texts] = True
    if not bool(seen.all()):
        empty = int((~seen).nonzero()[0])
        raise ValueError(f"{side} has a text without a counted token: {str(texts[empty])[:60]!r}; leave it out.")
    return largest


def _differences(a: Float[Tensor, "n_a d_sae"], b: Float[Tensor, "n_b d_sae"]) -> Float[Tensor, " d_sae"]:
    return (a != 0).double().mean(0) - (b != 0).double().mean(0)


def auroc(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"]) -> Float[Tensor, " d"]:
    """Probability that a row of `a` is larger than one of `b`, ties counting half, for each column."""
    ordered = b.T.contiguous().sort(dim=1).values
    below, upto = (torch.searchsorted(ordered, a.T.contiguous(), right=right) for right in (False, True))
    return (below + upto).double().mean(1) / (2 * len(b))


def _scored(
    feature: int, selected_by: float, a: Float[Tensor, " n_a"], b: Float[Tensor, " n_b"], rng: np.random.Generator
) -> ConceptFeature:
    fired: list[Int[np.ndarray, 1]] = [np.array([int((side != 0).sum())]) for side in (a, b)]
    low, high = newcombe(fired[0], len(a), fired[1], len(b))
    drawn = [side[torch.from_numpy(rng.integers(0, len(side), (N_BOOTSTRAP, len(side))))].T for side in (a, b)]
    areas = np.quantile(auroc(*drawn).numpy(), (0.025, 0.975))
    shares = int(fired[0][0]) / len(a), int(fired[1][0]) / len(b)
    area = float(auroc(a[:, None], b[:, None])[0])
    ends = float(low[0]), float(high[0]), area, float(areas[0]), float(areas[1])
    return ConceptFeature(feature, selected_by, *shares, shares[0] - shares[1], *ends, len(a), len(b))
