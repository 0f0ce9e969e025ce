"""A k that falls during training (Makhzani and Frey 2013, "k-sparse autoencoders", arXiv 1312.5663): with a large k at first
every feature learns something, so that fewer die. It falls linearly from `k_start` to `k` over the first half of the run:

    k(step) = k_start + (k - k_start) min(step / (n_steps / 2), 1)
"""

from __future__ import annotations

from typing import Any

from saelab.saes.step import StepInfo
from saelab.validation import check_integer

ANNEALED = 0.5
"""Fraction of the run over which k falls, as in the paper."""


def annealed_k(config: Any, info: StepInfo) -> float:
    """The k of a training step, in general a fraction; `config.k` if there is no `k_start`."""
    if config.k_start is None:
        return config.k
    progress = min(info.step / (ANNEALED * info.n_steps), 1.0)
    return config.k_start + (config.k - config.k_start) * progress


def check_k_start(config: Any) -> None:
    """Raise `ValueError` for a `k_start` that is not between k and d_sae."""
    if config.k_start is None:
        return
    check_integer("k_start", config.k_start, 1)
    if not config.k <= config.k_start <= config.d_sae:
        raise ValueError(
            f"k_start={config.k_start} must be between k={config.k} and d_sae={config.d_sae}: k falls from it during training."
        )
