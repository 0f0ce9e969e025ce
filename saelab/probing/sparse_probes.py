"""k-sparse probes of one label against the others, whose features a probe with an L1 penalty chooses.

    minimise over w, b:   mean log-loss (both sides of a label weigh the same) + l1 |w|_1

for all labels together, by accelerated proximal gradient descent (FISTA). Each feature is measured in its mean where it fires, so
that the penalty does not prefer strong features. The k features with the largest positive weights are then fitted anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs
from saelab.steering.logistic import balanced_weights, fit_logistic

L1 = 0.01
N_STEPS = 300
RISE = 0.03
"""Rise of F1 by which a further feature counts."""
RIDGE = 1e-4
"""L2 penalty of the probes on k features, which only keeps weights finite."""


def sparse_weights(
    feature_acts: SparseActs, y: Bool[Tensor, "n n_labels"], l1: float = L1, n_steps: int = N_STEPS
) -> Float[Tensor, "n_labels d_sae"]:
    """Weights of the L1 probe of each label, in units of each feature's mean where it fires."""
    values, features = feature_acts.values.double().cpu(), feature_acts.features.long().cpu()
    size = torch.zeros(feature_acts.d_sae, dtype=torch.float64).index_add_(0, features, values.abs())
    size /= torch.bincount(features, minlength=feature_acts.d_sae).clamp_min(1)
    where = torch.stack([feature_acts.rows.long().cpu(), features])
    shape = (len(y), feature_acts.d_sae)
    x = torch.sparse_coo_tensor(
        where, values / size[features].clamp_min(1e-30), shape, check_invariants=True
    ).coalesce()
    share = torch.stack([balanced_weights(one.double()) for one in y.T], 1) / len(y)  # (n, n_labels)
    step = 1 / _curvature(x, share)
    target, w, b = y.double(), torch.zeros(shape[1], y.shape[1], dtype=torch.float64), torch.zeros(y.shape[1]).double()
    ahead_w, ahead_b, momentum = w, b, 1.0
    for _ in range(n_steps):
        slope = share * (torch.sigmoid(torch.sparse.mm(x, ahead_w) + ahead_b) - target)
        moved = ahead_w - step * torch.sparse.mm(x.t(), slope)
        after_w = moved.sign() * (moved.abs() - step * l1).clamp_min(0)
        after_b = ahead_b - step * slope.sum(0)
        faster = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        pull, momentum = (momentum - 1) / faster, faster
        ahead_w, ahead_b = after_w + pull * (after_w - w), after_b + pull * (after_b - b)
        w, b = after_w, after_b
    return w.T


def _curvature(x: Tensor, share: Float[Tensor, "n n_labels"], n_steps: int = 30) -> float:
    """A bound on the largest curvature of the loss of any label: that of the rows, the bias counting as a column of ones, by the
    power method and a tenth on top."""
    v = torch.ones(x.shape[1], share.shape[1], dtype=torch.float64)
    b, size = torch.ones(share.shape[1], dtype=torch.float64), torch.ones(share.shape[1], dtype=torch.float64)
    for _ in range(n_steps):
        size = torch.sqrt(v.square().sum(0) + b.square())
        seen = share * (torch.sparse.mm(x, v / size) + b / size)
        v, b = torch.sparse.mm(x.t(), seen), seen.sum(0)
    return 1.1 * float(torch.sqrt(v.square().sum(0) + b.square()).max()) / 4


def best_features(weights: Float[Tensor, " d_sae"], k: int) -> list[int]:
    """At most `k` features with the largest weights above 0, the largest first."""
    order = weights.argsort(descending=True, stable=True)[:k]
    return [int(i) for i in order if weights[i] > 0]


class Split(NamedTuple):
    """The features of a label."""

    f1: list[float]
    """On the test rows, of the probe on the best feature, on the best two, and so on."""
    main: list[int]
    """Those that count: one more as long as F1 rises."""


def split_of(
    feature_acts: SparseActs,
    weights: Float[Tensor, " d_sae"],
    y: Bool[np.ndarray, " n"],
    test: Bool[np.ndarray, " n"],
    max_k: int,
    rise: float = RISE,
) -> Split:
    """The features by which a label is known, at most `max_k`, out of those with weights above 0 (`sparse_weights`)."""
    features = best_features(weights, max_k)
    x, labels, held = columns(feature_acts, features), torch.from_numpy(y[~test]).double(), torch.from_numpy(test)
    scores = []
    for k in range(1, len(features) + 1):
        weight, bias = fit_logistic(x[~held, :k], labels, RIDGE)
        scores.append(f1((x[held, :k] @ weight + bias).numpy() > 0, y[test]))
    return Split(scores, features[: n_split(scores, rise)])


def f1(said: Bool[np.ndarray, " n"], y: Bool[np.ndarray, " n"]) -> float:
    """Harmonic mean of precision and recall; 0 if nothing is right."""
    right = int((said & y).sum())
    return 2 * right / (int(said.sum()) + int(y.sum())) if right else 0.0


def n_split(scores: Sequence[float], rise: float) -> int:
    """How many features a label is split into: one more as long as F1 rises by at least `rise`."""
    n = min(1, len(scores))
    while n < len(scores) and scores[n] - scores[n - 1] >= rise:
        n += 1
    return n


def columns(feature_acts: SparseActs, features: Sequence[int]) -> Float[Tensor, "n k"]:
    """Dense float64 columns of a few features."""
    found = [feature_acts.column(i).double().cpu() for i in features]
    return torch.stack(found, 1) if found else torch.zeros(feature_acts.batch, 0, dtype=torch.float64)
