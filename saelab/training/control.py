"""What an SAE with `normalize="whiten"` whitens by: the rows of its control data, by default those it is trained on."""

from __future__ import annotations

from typing import Any

import torch

from saelab.saes import SAE
from saelab.training.data_source import MOST_ROWS, DataSource


def with_control(source: DataSource, control: DataSource | None, configs: list[Any]) -> DataSource:
    """The source with its control data. Raises `ValueError` if no SAE whitens by them."""
    if control is not None and not any(source.whitens(config) for config in configs):
        raise ValueError("control is what normalize='whiten' whitens by: set that, or leave control out.")
    source.control = control
    return source


def whiten_by_control(sae: SAE, source: DataSource) -> None:
    """Fit the whitening of an SAE that has one, unless training begins with a given SAE.

    Raises `ValueError` for control data of another width, too few rows, or none.
    """
    if sae.whitening is None or source.start is not None:
        return
    control = source if source.control is None else source.control
    if control.sample is None:
        raise ValueError(
            "normalize='whiten' needs rows that can be read before training: give control rows (control=, --control), such as a "
            "cache or a tensor."
        )
    (hook,) = control.choose(type(sae), sae.config).inputs
    x = control.sample(hook)[:MOST_ROWS].double()
    if x.ndim != 2 or x.shape[1] != sae.d_in or len(x) < 2:
        raise ValueError(f"Control rows must be (n, {sae.d_in}), at least 2 of them; got {tuple(x.shape)}.")
    sae.whitening.fit(x.mean(0), torch.cov(x.T, correction=0))
