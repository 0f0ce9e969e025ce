"""Which rows a probe is trained and tested on: a split of a set, and four regimes of its training half.

The test half stays as it is in every regime. All draws depend on the set, the regime and the number of the split alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from saelab.probing.labelled_sets import seed_of

VALIDATION_SHARE, MOST_VALIDATION = 0.2, 100
"""Rows of the one validation split of a large training set."""
ONE_SPLIT_FROM, N_FOLDS = 128, 6
"""Training sets of fewer rows are validated in folds instead."""
FEWEST_IN_SPLIT = 10
"""Or if they have fewer rows of a label."""


class Regime(NamedTuple):
    """What is done to a training half."""

    kind: Literal["standard", "few", "imbalance", "noise"] = "standard"
    amount: float = 0.0
    """"few": rows that are left, half of them of either label; "imbalance": the share of "yes" among them; "noise": the share of
    labels that are flipped."""

    def __str__(self) -> str:
        return self.kind if self.kind == "standard" else f"{self.kind} {self.amount:g}"


class Split(NamedTuple):
    """Rows of a set by number, and the labels that the training rows have in this regime."""

    train: Int[np.ndarray, " n_train"]
    y: Bool[np.ndarray, " n_train"]
    test: Int[np.ndarray, " n_test"]


def split(name: str, y: Bool[np.ndarray, " n"], regime: Regime, number: int, n_train: int, n_test: int) -> Split:
    """Split `number` of the set `name`: of a set with too few rows the halves shrink alike."""
    generator = np.random.default_rng(seed_of("split", name, number))
    share = n_train / (n_train + n_test)
    train, test = [], []
    for label in (False, True):
        rows = generator.permutation(np.flatnonzero(y == label))
        n = min(n_train // 2, int(len(rows) * share))
        train.append(rows[:n])
        test.append(rows[n : n + n_test // 2])
    kept = np.concatenate(_reduced(train, regime))
    labels = y[kept]
    if regime.kind == "noise":
        drawn = np.random.default_rng(seed_of("noise", name, number))
        flipped = drawn.permutation(len(kept))[: round(regime.amount * len(kept))]
        labels[flipped] = ~labels[flipped]
    return Split(kept, labels, np.concatenate(test))


def _reduced(train: Sequence[np.ndarray], regime: Regime) -> Sequence[np.ndarray]:
    """The training rows of "no" and of "yes" that a regime leaves: the first ones of their random order."""
    no, yes = train
    if regime.kind == "few":
        n = int(regime.amount) // 2
        return no[:n], yes[:n]
    if regime.kind == "imbalance":
        return no, yes[: max(2, round(len(no) * regime.amount / (1 - regime.amount)))]
    return train


def validation_folds(y: Bool[np.ndarray, " n_train"]) -> list[Bool[np.ndarray, " n_train"]]:
    """Which rows are held out, in each fold: one fifth, but at most 100 rows, of a large training set; up to six folds of a small
    one. Both labels are spread evenly. Raises `ValueError` for a label with fewer than 2 rows."""
    fewest = int(min(y.sum(), (~y).sum()))
    if fewest < 2:
        raise ValueError(f"A probe needs at least 2 training rows of either label, got {fewest}.")
    place = np.zeros(len(y), dtype=np.int64)
    for label in (False, True):
        place[y == label] = np.arange((y == label).sum())
    if len(y) >= ONE_SPLIT_FROM and fewest >= FEWEST_IN_SPLIT:
        every = max(round(1 / VALIDATION_SHARE), -(-len(y) // MOST_VALIDATION))
        return [place % every == every - 1]
    n_folds = min(N_FOLDS, fewest)
    return [place % n_folds == fold for fold in range(n_folds)]
