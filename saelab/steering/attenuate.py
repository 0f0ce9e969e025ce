"""Suppressing a concept by the posterior probability of its features' activations (APP):

    a' = a (1 - strength p(c | a)),   p(c | a) = pi f_c(a) / (pi f_c(a) + (1 - pi) f_other(a)),   x' = x + sum_j (a'_j - a_j) d_j

for the features whose activations separate tokens of the concept from others best, by Jensen-Shannon distance. The densities f
are a point mass at zero and a Gaussian over the other activations, fitted to the tokens of each set: our own choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.edits.direction import finite
from saelab.edits.rows import edited_rows, encoded_rows, with_changes
from saelab.errors import SaelabError
from saelab.features.separability import separability
from saelab.models import LanguageModel
from saelab.saes import SAE
from saelab.saes.trained_hooks import check_is_sae, needs_other_hooks, refuse_partial, steered_hook
from saelab.steering.text_activations import stream_tokens, text_list
from saelab.steering.unsteered import refuse_steered
from saelab.validation import check_integer

HOW = ("posterior", "mask", "range")
RANGE = 2.5
"""Half width of the range that `how="range"` suppresses, in standard deviations of the concept's activations."""
_SMALLEST = 1e-3
"""A standard deviation is at least this share of the feature's root mean square activation."""


class Posterior(NamedTuple):
    """Two Gaussians for each feature, `(n_features,)` in float64, over its activations that are not zero."""

    mean: Float[Tensor, " n_features"]
    std: Float[Tensor, " n_features"]
    """On tokens of the concept."""
    other_mean: Float[Tensor, " n_features"]
    other_std: Float[Tensor, " n_features"]
    fires: Float[Tensor, " n_features"]
    """Log of the share of the concept's tokens on which it fires, over the share of the others."""
    low: Float[Tensor, " n_features"]
    high: Float[Tensor, " n_features"]
    """Activations outside of those seen count as the nearest one seen: the tails of Gaussians say nothing."""

    def probability(self, feature_acts: Tensor, prior: float) -> Float[Tensor, "n n_features"]:
        """p(c | a) of activations `(n, n_features)` that are not zero."""
        a = feature_acts.double().clamp(self.low, self.high)
        log_odds = math.log(prior) - math.log1p(-prior) if 0 < prior < 1 else math.inf * (prior - 0.5)
        likelihood = _log_normal(a, self.mean, self.std) - _log_normal(a, self.other_mean, self.other_std)
        return torch.sigmoid(log_odds + self.fires + likelihood)


def _log_normal(a: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -((a - mean) / std).square() / 2 - std.log()


@dataclass(frozen=True, eq=False)
class Attenuation:
    """An edit for `lm.steer` that suppresses features of a concept, made by `attenuate`.

    The SAE's error and all other features stay as they are; a token on which none of the features fires stays bit-identical,
    as do position 0 and padding.
    """

    hook_name: str
    sae: SAE
    features: tuple[int, ...]
    """The most separable first."""
    distances: tuple[float, ...]
    """Their Jensen-Shannon distances between tokens of the concept and others, 0 to 1."""
    posterior: Posterior
    how: str = "posterior"
    strength: float = 1.0
    """0 changes nothing, 1 suppresses fully."""
    prior: float = 0.5
    """Probability of the concept before the activation is seen: 0 changes nothing, 1 suppresses as a mask does."""
    source: int = -1

    def __post_init__(self) -> None:
        _check(self.how, self.strength, self.prior)

    def __repr__(self) -> str:
        return f"<attenuate {len(self.features)} features at {self.hook_name}: {self.how}, strength {self.strength:g}>"

    def __mul__(self, factor: float) -> Attenuation:
        """The same edit with its strength multiplied; the product must be between 0 and 1."""
        return replace(self, strength=self.strength * finite(factor))

    __rmul__ = __mul__

    @property
    def sets(self) -> tuple[tuple[Any, int], ...]:
        """What two edits must not both set: the features that it suppresses."""
        return tuple(((self.hook_name, id(self.sae), feature), 0) for feature in self.features)

    @property
    def d_in(self) -> int:
        """Width of the activations it edits."""
        return self.sae.decoder(self.source)[0].shape[1]

    def suppressed(self, feature_acts: Float[Tensor, "n n_features"]) -> Float[Tensor, "n n_features"]:
        """Share of each activation that is taken away, between 0 and `strength`."""
        if self.how == "mask":
            share = torch.ones_like(feature_acts, dtype=torch.float64)
        elif self.how == "range":
            share = ((feature_acts.double() - self.posterior.mean).abs() <= RANGE * self.posterior.std).double()
        else:
            share = self.posterior.probability(feature_acts, self.prior)
        return (self.strength * share).to(feature_acts.dtype)

    def apply(
        self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq d_in"]:
        """The edited activations; `x` itself when nothing changes."""
        return self.apply_knowing(x, positions, {})

    @torch.no_grad()
    def apply_knowing(
        self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"], known: dict[Any, Any]
    ) -> Float[Tensor, "batch seq d_in"]:
        """As `apply`, with what other edits have computed from the same arguments."""
        flat, rows = edited_rows(x, positions)
        sparse_acts = encoded_rows(self.sae, flat, rows, known)
        feature_acts = (
            torch.stack([sparse_acts.column(i) for i in self.features], 1).float().cpu()
        )  # (n_rows, n_features)
        change = -feature_acts * self.suppressed(feature_acts)
        moved = (change != 0).any(1)
        if not bool(moved.any()):
            return x
        rows, change = rows[moved.to(rows.device)], change[moved].to(x.device)
        decoder, scale = self.sae.decoder(self.source)
        directions = (decoder[list(self.features)].float() / scale.float()).to(x.device)  # (n_features, d_in)
        return with_changes(x, rows, lambda before: (change @ directions) * self.sae.token_sizes(before))


def _check(how: str, strength: float, prior: float) -> None:
    if how not in HOW:
        raise ValueError(f"how={how!r} is unknown; expected one of {', '.join(HOW)}.")
    for name, value in (("strength", strength), ("prior", prior)):
        if not 0 <= finite(value, name) <= 1:
            raise ValueError(f"{name}={value!r} must be between 0 and 1.")


class _Firings(NamedTuple):
    """Activations that are not zero, on tokens of both sets."""

    values: Float[Tensor, " nnz"]
    features: Int[Tensor, " nnz"]
    concept: Bool[Tensor, " nnz"]
    n_tokens: tuple[int, int]
    """Counted tokens of the concept, and others."""


def attenuate(
    sae: Any,
    lm: LanguageModel,
    concept: Any,
    others: Any,
    n_features: int = 10,
    *,
    how: str = "posterior",
    strength: float = 1.0,
    prior: float = 0.5,
    hook_name: str | None = None,
) -> Attenuation:
    """An edit that suppresses a concept in proportion to how likely each activation of its features is to mean it.

    `concept` and `others` are lists of texts; their tokens, without position 0 and special ones, are the samples. Of the features
    that are more active on the concept, the `n_features` with the largest Jensen-Shannon distance are edited. `how="mask"` and
    "range" are the usual alternatives: zero always, or wherever an activation is within 2.5 standard deviations of the
    concept's mean. `strength` and `prior` are between 0 and 1. Raises `ValueError` for other values, sides without tokens, a
    model that is being steered, and an SAE whose activations need other hooks than the one it is steered at; `SaelabError` if no
    feature is more active on the concept.
    """
    check_is_sae(sae, "attenuate")
    check_integer("n_features", n_features, 1, sae.d_sae)
    _check(how, strength, prior)  # before the texts are read
    refuse_steered(lm)
    refuse_partial(sae, "steered")
    hook, source = steered_hook(sae, hook_name)
    if hook is None:
        raise ValueError("The SAE does not record the hook it was trained on; pass hook_name.")
    hook = hook.rpartition("/")[2]  # "MODEL/HOOK" for an SAE of several models
    if needs_other_hooks(sae):
        raise ValueError(
            f"attenuate needs the feature activations, which this {sae.variant} cannot compute from {hook}."
        )
    firings = _firings(sae, lm, text_list(concept, "concept"), text_list(others, "others"), hook)
    chosen, distances = _most_separable(firings, n_features, sae.d_sae)
    if not chosen:
        raise SaelabError("No feature is more active on the texts of the concept than on the others: give other texts.")
    return Attenuation(hook, sae, chosen, distances, _fitted(firings, chosen), how, strength, prior, source)


def _most_separable(firings: _Firings, n: int, d_sae: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """At most `n` features that are more active on the concept, by distance, and their distances."""
    values, features, concept, n_tokens = firings
    distances = separability(values, features, concept, n_tokens, d_sae)
    size = values.double().abs() * torch.where(concept, 1 / n_tokens[0], -1 / n_tokens[1])
    excess = torch.zeros(d_sae, dtype=torch.float64).index_add_(0, features, size)
    scores = torch.where((excess > 0) & (distances > 0), distances, 0.0)
    order = scores.sort(descending=True, stable=True).indices[: min(n, int((scores > 0).sum()))]
    return tuple(order.tolist()), tuple(distances[order].tolist())


@torch.no_grad()
def _firings(sae: SAE, lm: LanguageModel, concept: Sequence[Any], others: Sequence[Any], hook: str) -> _Firings:
    values, features, flags, n_tokens = [], [], [], []
    for texts, side in ((concept, "concept"), (others, "others")):
        n_tokens.append(0)
        for tokens in stream_tokens(lm, texts, [hook]):
            n_tokens[-1] += len(tokens.texts)
            feature_acts = sae.encode(tokens.x[hook].float().to(sae.W_dec.device))
            fired = feature_acts.values != 0
            values.append(feature_acts.values[fired].float().cpu())
            features.append(feature_acts.features[fired].long().cpu())
            flags.append(torch.full(features[-1].shape, side == "concept"))
        if not n_tokens[-1]:
            raise ValueError(
                f"{side} holds {len(texts)} texts and no counted token; give texts of at least two tokens."
            )
    return _Firings(torch.cat(values), torch.cat(features), torch.cat(flags), (n_tokens[0], n_tokens[1]))


def _fitted(firings: _Firings, chosen: Sequence[int]) -> Posterior:
    """Each Gaussian as if one more activation had been seen, with mean and variance of both sets together."""
    columns = []
    for feature in chosen:
        here = firings.features == feature
        both, concept = firings.values[here].double(), firings.concept[here]
        floor = float(_SMALLEST * both.square().mean().sqrt())
        mean, square = both.mean(), both.square().mean()
        fitted, shares = [], []
        for values, n in ((both[concept], firings.n_tokens[0]), (both[~concept], firings.n_tokens[1])):
            middle = (values.sum() + mean) / (len(values) + 1)
            variance = (values.square().sum() + square) / (len(values) + 1) - middle.square()
            fitted += [middle, variance.clamp_min(0).sqrt().clamp_min(floor)]
            shares.append((len(values) + 0.5) / (n + 1))
        fires = torch.tensor(math.log(shares[0] / shares[1]), dtype=torch.float64)
        columns.append(torch.stack([*fitted, fires, both.min(), both.max()]))
    return Posterior(*torch.stack(columns, 1))
