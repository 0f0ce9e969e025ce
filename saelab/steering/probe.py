"""A linear probe as a direction: L2-regularised logistic regression on the mean activation of each text.

    p(pos | text) = sigmoid(w . mean(x) + b)

With few texts and many dimensions the weights lie in the span of the texts, where Newton's method runs; no random number but
the split of the texts.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.edits.direction import Direction
from saelab.models import LanguageModel
from saelab.steering.text_activations import distinct_texts, text_list, text_vectors
from saelab.steering.unsteered import refuse_steered
from saelab.validation import check_integer

PENALTIES = tuple(10.0**power for power in range(-6, 3))
"""L2 penalties that are tried, for activations whose root mean square norm is 1 once their mean is subtracted."""
TEST_SHARE = 4
"""One text in so many, of each side, is held out to measure the accuracy."""
N_FOLDS = 4
N_NEWTON = 100


class Probe(Direction):
    """A direction that also classifies: `vector` and `bias` are in raw units, so that `x . vector + bias` is the log odds of
    `pos`. Its norm says how steep the classifier is, not how far apart the texts are: steer with `unit="resid_norm"`."""

    def __init__(self, vector: Tensor, hook_name: str, bias: float, accuracy: float, n_test: int, penalty: float):
        super().__init__(vector, hook_name)
        self.bias = float(bias)
        self.accuracy, self.n_test, self.penalty = accuracy, n_test, penalty
        """Share of the `n_test` texts held out that are classified correctly, the mean of both sides; and the L2 penalty."""

    def __repr__(self) -> str:
        return (
            f"Probe(d_in {self.vector.numel()}, at {self.hook_name}, {self.accuracy:.1%} correct on {self.n_test} "
            f"held-out texts, penalty {self.penalty:g})"
        )

    def log_odds(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch"]:
        """Log odds of `pos` at activations, of tokens or means over tokens; positive means `pos`."""
        return x.float() @ self.vector.to(x.device) + self.bias

    def probability(self, lm: LanguageModel, texts: Any) -> Float[Tensor, " n_texts"]:
        """Probability of `pos` for one text or several. Raises `ValueError` for a text without a counted token."""
        vectors = text_vectors(lm, text_list(texts, "texts"), self.hook_name, "texts")
        return torch.sigmoid(vectors @ self.vector.double() + self.bias).float()


def probe(lm: LanguageModel, pos: Any, neg: Any, hook_name: str, *, seed: int = 0) -> Probe:
    """Train a probe that tells the texts of `pos` from those of `neg`, both counting equally whatever their numbers.

    A quarter of each side, drawn with `seed`, is held out and only measures the accuracy; the penalty is the one of `PENALTIES`
    with the best log-loss in 4-fold cross-validation on the rest, on which the returned probe is trained. A text's vector is the
    mean over its tokens, without position 0 and special tokens. Raises `ValueError` for fewer than 8 different texts a side,
    texts without tokens, an unknown hook, and a model that is being steered.
    """
    lm.check_hook(hook_name)
    check_integer("seed", seed, 0)
    refuse_steered(lm)
    sides = [distinct_texts(texts, side) for texts, side in ((pos, "pos"), (neg, "neg"))]
    for texts, side in zip(sides, ("pos", "neg"), strict=True):
        if len(texts) < 2 * N_FOLDS:
            raise ValueError(f"{side} has {len(texts)} different texts; a probe needs at least {2 * N_FOLDS} a side.")
    x = torch.cat([text_vectors(lm, texts, hook_name, side) for texts, side in zip(sides, ("pos", "neg"), strict=True)])
    y = torch.cat([torch.ones(len(sides[0])), torch.zeros(len(sides[1]))]).double()
    generator = torch.Generator().manual_seed(seed)
    turn = torch.cat([torch.randperm(len(texts), generator=generator) for texts in sides])
    test, fold = turn % TEST_SHARE == 0, turn // TEST_SHARE % N_FOLDS  # both sides are spread evenly
    penalty = _best_penalty(x[~test], y[~test], fold[~test])
    weight, bias = _fit(x[~test], y[~test], penalty)
    right = ((x[test] @ weight + bias > 0) == (y[test] > 0.5)).double()
    accuracy = float(_weights(y[test]) @ right) / int(test.sum())
    return Probe(weight, hook_name, bias, accuracy, int(test.sum()), penalty)


def _best_penalty(x: Float[Tensor, "n d_in"], y: Float[Tensor, " n"], fold: Tensor) -> float:
    """The penalty with the smallest log-loss on texts that it was not fitted on; of equals, the largest."""
    losses = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for i in fold.unique():
        out: Bool[Tensor, " n"] = fold == i
        for j, penalty in enumerate(PENALTIES):
            weight, bias = _fit(x[~out], y[~out], penalty)
            losses[j] += _log_loss(x[out] @ weight + bias, y[out]).sum()
    return PENALTIES[int((losses <= losses.min()).nonzero().max())]


def _log_loss(log_odds: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return torch.nn.functional.softplus(torch.where(y > 0.5, -log_odds, log_odds))


def _weights(y: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Weights of the texts, 1 on average: both sides weigh the same."""
    share = y.mean()
    return torch.where(y > 0.5, 0.5 / share, 0.5 / (1 - share))


def _fit(x: Float[Tensor, "n d_in"], y: Float[Tensor, " n"], penalty: float) -> tuple[Float[Tensor, " d_in"], float]:
    """Weights and bias in raw units. The rows are centred, divided by their root mean square norm, and turned into the
    coordinates of their span: none of these changes which weights are penalised how much."""
    mean = x.mean(0)
    size = (x - mean).square().sum(1).mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    left, sizes, rows = torch.linalg.svd((x - mean) / size, full_matrices=False)
    found = logistic_regression(left * sizes, y, penalty)
    weight = found[:-1] @ rows / size
    return weight, float(found[-1] - weight @ mean)


def logistic_regression(x: Float[Tensor, "n d"], y: Float[Tensor, " n"], penalty: float) -> Float[Tensor, " d_plus_1"]:
    """Weights, then bias, that minimise mean log-loss (both labels weigh the same) + penalty / 2 |weights|^2, by Newton's method
    with step halving."""
    wide = torch.cat([x, x.new_ones(len(x), 1)], 1)  # (n, d + 1)
    ridge = x.new_full((wide.shape[1],), penalty)
    ridge[-1] = 0
    share, found = _weights(y) / len(y), x.new_zeros(wide.shape[1])

    def loss(point: Tensor) -> Tensor:
        return share @ _log_loss(wide @ point, y) + (ridge * point.square()).sum() / 2

    for _ in range(N_NEWTON):
        p = torch.sigmoid(wide @ found)
        gradient = wide.T @ (share * (p - y)) + ridge * found
        curvature = (wide.T * (share * p * (1 - p)).clamp_min(1e-12)) @ wide + torch.diag(ridge)
        step, before = torch.linalg.solve(curvature, gradient), loss(found)
        scale = 1.0
        while scale > 1e-8 and not bool(loss(found - scale * step) <= before):
            scale /= 2
        found = found - scale * step
        if float(gradient.abs().max()) < 1e-11 or scale <= 1e-8:
            break
    return found
