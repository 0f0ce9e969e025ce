"""Batches for `bench_step`: activations from a cache, or random rows with a decaying spectrum."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

ON_GPU = 4
"""Batches that a GPU keeps and reuses in turn, so that no step waits for data."""


def batches(batch: int, d_in: int, device: str, cache: Path | None) -> Iterator[Tensor]:
    """Endless batches on the device; `d_in` is ignored with a cache."""
    rows = random_rows(batch, d_in, device) if cache is None else cached_rows(batch, cache)
    if torch.device(device).type == "cpu":
        return rows
    return itertools.cycle([x.to(device) for x in itertools.islice(rows, ON_GPU)])


def random_rows(batch: int, d_in: int, device: str) -> Iterator[Tensor]:
    """Gaussian rows whose covariance has eigenvalues proportional to 1/n, in a random basis; drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)
    spectrum = torch.arange(1, d_in + 1, device=device).pow(-0.5)
    spectrum *= (d_in / spectrum.square().sum()).sqrt()
    turn = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, device=device)).Q
    while True:
        yield torch.randn(batch, d_in, generator=generator, device=device) * spectrum @ turn


def cached_rows(batch: int, path: Path) -> Iterator[Tensor]:
    """Rows of an activation cache, normalised as for training."""
    from saelab.activation_cache.reader import ActivationCache
    from saelab.saes.config import normalization

    cache = ActivationCache(path)
    stats = cache.stats()
    center, scale = normalization("center_and_scale", stats["mean"].float(), stats["second_moment"].sum())
    for rows in cache.batches(batch):
        yield (rows - center.float()) * float(scale)
