"""Ways to turn a text into columns for a logistic regression: three baselines, and features of an SAE.

A method sees the labels of the rows that it is fitted on and no others. It yields the columns of all rows, once for each option
that validation chooses from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.probing.rows import Rows
from saelab.saes import SAE

PCA_SIZES = (2, 8, 32, 100)
"""Principal components that are tried."""
FEWEST_TEXTS = 2
"""A token is a column if so many of the texts hold it."""
BASELINES = ("raw", "pca", "tokens")
ALL_FEATURES = "all"


class Columns(NamedTuple):
    """The rows of a set in the three ways that methods read them, in float64."""

    raw: Float[Tensor, "n d_in"]
    features: Float[Tensor, "n n_firing"]
    """Of the features that fire on any of the rows."""
    feature_ids: Int[Tensor, " n_firing"]
    tokens: Float[Tensor, "n n_ids"]
    """1 where the text holds the token."""


Method = Callable[[Columns, Int[Tensor, " n_fit"], Bool[Tensor, " n_fit"]], Iterator[Tensor]]
"""(columns, rows to fit on, their labels) -> `(n, width)` of all rows for each option."""


@torch.inference_mode()
def columns_of(rows: Rows, sae: SAE) -> Columns:
    """What the methods read of a set."""
    found = sae.encode(rows.x.to(sae.center.device))
    feature_ids, place = found.features.cpu().unique(return_inverse=True)
    features = torch.zeros(len(rows.y), len(feature_ids), dtype=torch.float64)
    features[found.rows.cpu(), place] = found.values.cpu().double()
    ids, column = np.unique(np.concatenate(rows.tokens), return_inverse=True)
    tokens = torch.zeros(len(rows.y), len(ids), dtype=torch.float64)
    tokens[np.repeat(np.arange(len(rows.y)), [len(one) for one in rows.tokens]), column] = 1
    return Columns(rows.x.flatten(1).double(), features, feature_ids, tokens)


def methods(ks: Sequence[int]) -> dict[str, Method]:
    """The baselines, then the probes on `k` features for each of `ks`, and on all."""
    sparse: dict[str, Method] = {f"k={k}": functools.partial(sparse_features, k) for k in ks}
    return {"raw": raw, "pca": pca, "tokens": tokens, **sparse, ALL_FEATURES: all_features}


def raw(columns: Columns, fit: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The activations."""
    yield columns.raw


def pca(columns: Columns, fit: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Principal components of the activations, each dimension divided by its standard deviation."""
    known = columns.raw[fit]
    deviation = known.std(0, correction=0)
    scaled = (columns.raw - known.mean(0)) / torch.where(deviation > 0, deviation, 1)
    *_, directions = torch.linalg.svd(scaled[fit], full_matrices=False)
    for size in PCA_SIZES:
        if size < len(fit):
            yield scaled @ directions[:size].T


def tokens(columns: Columns, fit: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Which tokens a text holds, their order aside."""
    known = columns.tokens[fit].sum(0) >= FEWEST_TEXTS
    yield columns.tokens[:, known] if bool(known.any()) else columns.tokens


def sparse_features(k: int, columns: Columns, fit: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The `k` features that tell the labels apart best one by one."""
    yield columns.features[:, ranked(columns.features[fit], y)[:k]]


def all_features(columns: Columns, fit: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Every feature; those that never fire on the rows to fit on have no weight and are left out."""
    fires = (columns.features[fit] != 0).any(0)
    yield columns.features[:, fires] if bool(fires.any()) else columns.features


def ranked(features: Float[Tensor, "n n_features"], y: Bool[Tensor, " n"]) -> Int[Tensor, " n_features"]:
    """Features by the difference of their means on both labels, the largest first, each divided by its mean where it fires, so
    that strong features have no advantage; of equal ones, the first."""
    size = features.abs().sum(0) / ((features != 0).sum(0) + 1e-6) + 1e-6
    difference = (features[y].mean(0) - features[~y].mean(0)).abs() / size
    return difference.argsort(descending=True, stable=True)
