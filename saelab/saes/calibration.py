"""Calibration at the end of training: thresholds at which the configured number of features fires.

They are fitted on held-out rows, since fewer features fire on rows seen in training (2 to 6 % fewer on the activations
of a language model, after several epochs).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

ROWS_AT_ONCE = 2048
LOOSER_FACTORS = (0.9, 0.7, 0.4, 0.1, 0.01)
LOOSER_SHIFTS = (0.0, -0.05, -0.2, -0.8)


@torch.no_grad()
def level_for(
    l0: float,
    x: Float[Tensor, "n ..."],
    margins: Callable[[Tensor, float], Float[Tensor, " nnz"]],
    looser: tuple[float, ...],
) -> float | None:
    """The level that on average `l0` (token, feature) pairs per row of `x` exceed, midway between two adjacent margins.

    `margins(rows, level)` returns the margins of all pairs above `level`; the levels in `looser` are tried in turn until
    enough pairs exceed one. Returns None if `x` has no rows, `l0` rounds to no pair at all, or nothing exceeds the last
    level; returns the last level if too few pairs do.
    """
    if not len(x):
        return None
    wanted = round(l0 * len(x))
    found = torch.zeros(0)
    for level in looser:
        found = torch.cat([torch.zeros(0), *(margins(rows, level).float().cpu() for rows in x.split(ROWS_AT_ONCE))])
        if len(found) > wanted:
            ordered = found.sort(descending=True).values
            return float((ordered[wanted - 1].double() + ordered[wanted].double()) / 2) if wanted else None
    return looser[-1] if len(found) else None
