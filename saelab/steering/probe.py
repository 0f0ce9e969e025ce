"""A linear probe as a direction: L2-regularised logistic regression on the mean activation of each text.

    p(pos | text) = sigmoid(w . mean(x) + b)

No random number but the split of the texts.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.edits.direction import Direction
from saelab.models import LanguageModel
from saelab.steering.logistic import PENALTIES, balanced_weights, fit_logistic, fit_path, log_loss
from saelab.steering.text_activations import distinct_texts, text_list, text_vectors
from saelab.steering.unsteered import refuse_steered
from saelab.validation import check_integer

TEST_SHARE = 4
"""One text in so many, of each side, is held out to measure the accuracy."""
N_FOLDS = 4


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
    weight, bias = fit_logistic(x[~test], y[~test], penalty)
    right = ((x[test] @ weight + bias > 0) == (y[test] > 0.5)).double()
    accuracy = float(balanced_weights(y[test]) @ right) / int(test.sum())
    return Probe(weight, hook_name, bias, accuracy, int(test.sum()), penalty)


def _best_penalty(x: Float[Tensor, "n d_in"], y: Float[Tensor, " n"], fold: Tensor) -> float:
    """The penalty with the smallest log-loss on texts that it was not fitted on; of equals, the largest."""
    losses = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for i in fold.unique():
        out: Bool[Tensor, " n"] = fold == i
        weights, biases = fit_path(x[~out], y[~out])
        losses += log_loss(weights @ x[out].T + biases[:, None], y[out]).sum(1)
    return PENALTIES[int((losses <= losses.min()).nonzero().max())]
