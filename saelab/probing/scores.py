"""How well log odds tell two labels apart."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def auc(log_odds: Float[np.ndarray, "*n_fits n"], y: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "*n_fits"]:
    """The area under the ROC curve: the probability that a row of "yes" has larger log odds than one of "no", ties counting a
    half. Raises `ValueError` without a row of either label."""
    n_yes, n_no = int(y.sum()), int((~y).sum())
    if not n_yes or not n_no:
        raise ValueError(f"An AUC needs rows of both labels, got {n_yes} of yes and {n_no} of no.")
    yes, no = log_odds[..., y], np.sort(log_odds[..., ~y], axis=-1)
    if log_odds.ndim > 1:
        return np.array([auc(row, y) for row in log_odds])
    below, up_to = (np.searchsorted(no, yes, side=side) for side in ("left", "right"))
    return np.asarray((below + up_to).sum() / (2 * n_yes * n_no))


def balanced_accuracy(log_odds: Float[np.ndarray, " n"], y: Bool[np.ndarray, " n"]) -> float:
    """The share of rows that are on the right side of 0, the mean of both labels: chance is one half however rare a label is."""
    return float(((log_odds[y] > 0).mean() + (log_odds[~y] <= 0).mean()) / 2)
