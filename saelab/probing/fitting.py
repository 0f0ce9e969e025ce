"""One method on one split: validation on training rows chooses the option and the penalty, and the test rows are scored once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool

from saelab.probing.methods import Columns, Method, ranked
from saelab.probing.regimes import Split, validation_folds
from saelab.probing.scores import auc, balanced_accuracy
from saelab.steering.logistic import PENALTIES, fit_logistic, fit_path


class Outcome(NamedTuple):
    """How a method did on a split."""

    validation: float
    """Its mean AUC on the training rows that were held out, by which it is chosen among methods."""
    auc: float
    """On the test rows."""
    accuracy: float
    """Likewise, the mean of both labels."""
    option: int
    penalty: float


def outcome(method: Method, columns: Columns, rows: Split, y: Bool[np.ndarray, " n"]) -> Outcome:
    """Choose on the training rows, fit on all of them, and score on the test rows, whose labels `y` has."""
    option, penalty, validation = _chosen(method, columns, rows)
    fit, labels = torch.from_numpy(rows.train), torch.from_numpy(rows.y)
    found = list(method(columns, fit, labels))[option]
    weight, bias = fit_logistic(found[fit], labels.double(), penalty)
    log_odds = (found[torch.from_numpy(rows.test)] @ weight + bias).numpy()
    right = y[rows.test]
    return Outcome(validation, float(auc(log_odds, right)), balanced_accuracy(log_odds, right), option, penalty)


def best_feature(columns: Columns, rows: Split) -> int | None:
    """The feature that tells the training labels apart best; None if no feature fires."""
    if not len(columns.feature_ids):
        return None
    return int(columns.feature_ids[ranked(columns.features[torch.from_numpy(rows.train)], torch.from_numpy(rows.y))[0]])


def _chosen(method: Method, columns: Columns, rows: Split) -> tuple[int, float, float]:
    """The option and the penalty with the best mean AUC over the folds, and that AUC; of equal ones the first option, and the
    largest penalty."""
    scores = []
    for held in validation_folds(rows.y):
        fit, out = (torch.from_numpy(rows.train[mask]) for mask in (~held, held))
        labels = torch.from_numpy(rows.y[~held])
        fold = []
        for found in method(columns, fit, labels):
            weights, biases = fit_path(found[fit], labels.double())
            fold.append(auc((weights @ found[out].T + biases[:, None]).numpy(), rows.y[held]))
        scores.append(fold)
    n_options = min(map(len, scores))
    mean = np.mean([fold[:n_options] for fold in scores], axis=0)  # (options, penalties)
    option, place = divmod(int(mean[:, ::-1].argmax()), len(PENALTIES))
    return option, PENALTIES[len(PENALTIES) - 1 - place], float(mean.max())
