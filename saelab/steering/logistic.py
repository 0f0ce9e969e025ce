"""L2-regularised logistic regression by Newton's method, both labels weighing the same whatever their numbers.

With few rows and many columns the weights lie in the span of the rows, where Newton's method runs. Several penalties share one
decomposition, and each starts at the solution of the one before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

PENALTIES = tuple(10.0**power for power in range(-6, 3))
"""L2 penalties that are tried, for rows whose root mean square norm is 1 once their mean is subtracted."""
N_NEWTON = 100


def fit_logistic(
    x: Float[Tensor, "n d_in"], y: Float[Tensor, " n"], penalty: float
) -> tuple[Float[Tensor, " d_in"], float]:
    """Weights and bias in raw units."""
    weights, biases = fit_path(x, y, (penalty,))
    return weights[0], float(biases[0])


def fit_path(
    x: Float[Tensor, "n d_in"], y: Float[Tensor, " n"], penalties: Sequence[float] = PENALTIES
) -> tuple[Float[Tensor, "n_penalties d_in"], Float[Tensor, " n_penalties"]]:
    """Weights and biases in raw units for each penalty. The rows are centred, divided by their root mean square norm, and turned
    into the coordinates of their span: none of these changes which weights are penalised how much."""
    mean = x.mean(0)
    size = (x - mean).square().sum(1).mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    left, sizes, rows = torch.linalg.svd((x - mean) / size, full_matrices=False)
    found = x.new_zeros(len(penalties), len(sizes) + 1)
    start = found[0]
    for i in sorted(range(len(penalties)), key=lambda i: -penalties[i]):
        start = found[i] = logistic_regression(left * sizes, y, penalties[i], start)
    weights = found[:, :-1] @ rows / size
    return weights, found[:, -1] - weights @ mean


def logistic_regression(
    x: Float[Tensor, "n d"], y: Float[Tensor, " n"], penalty: float, start: Tensor | None = None
) -> Float[Tensor, " d_plus_1"]:
    """Weights, then bias, that minimise mean log-loss (both labels weigh the same) + penalty / 2 |weights|^2, by Newton's method
    with step halving, from `start` or zero."""
    wide = torch.cat([x, x.new_ones(len(x), 1)], 1)  # (n, d + 1)
    ridge = x.new_full((wide.shape[1],), penalty)
    ridge[-1] = 0
    share, found = balanced_weights(y) / len(y), x.new_zeros(wide.shape[1]) if start is None else start

    def loss(point: Tensor) -> Tensor:
        return share @ log_loss(wide @ point, y) + (ridge * point.square()).sum() / 2

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


def log_loss(log_odds: Float[Tensor, "*n_fits n"], y: Float[Tensor, " n"]) -> Float[Tensor, "*n_fits n"]:
    """The loss of each row."""
    return torch.nn.functional.softplus(torch.where(y > 0.5, -log_odds, log_odds))


def balanced_weights(y: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Weights of the rows, 1 on average: both labels weigh the same."""
    share = y.mean()
    return torch.where(y > 0.5, 0.5 / share, 0.5 / (1 - share))
