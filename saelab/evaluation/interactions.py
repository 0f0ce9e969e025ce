"""Whether features interact because they fire together: over all pairs, the norm of what their product decodes to against the
share of tokens on which both fire (Koromilas et al. 2026, "PolySAE", who find a correlation of 0.06)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.interactions import pair_norms
from saelab.validation import check_integer


class PairTable(NamedTuple):
    """Pairs of features, each once."""

    pairs: Int[Tensor, "n_pairs 2"]
    norms: Float[Tensor, " n_pairs"]
    """Of the coefficient of the product of both activations, in raw units."""
    together: Float[Tensor, " n_pairs"]
    """Share of the tokens on which both fire."""

    @property
    def correlation(self) -> float:
        """Pearson's r of both columns; NaN where one is constant."""
        return pearson(self.norms, self.together)


def pair_table(sae: Any, feature_acts: SparseActs, n_features: int = 1000) -> PairTable:
    """All pairs of the `n_features` features that fire most often in these activations, of those that fire at all.

    Raises `ValueError` for an SAE whose decoder has no products.
    """
    check_integer("n_features", n_features, 2)
    features = busiest(feature_acts, n_features)
    norms, together = pair_norms(sae, features.tolist()).cpu(), firing_together(feature_acts, features)
    i, j = torch.triu_indices(len(features), len(features), 1)
    return PairTable(torch.stack([features[i], features[j]], 1), norms[i, j], together[i, j])


def busiest(feature_acts: SparseActs, n_features: int) -> Int[Tensor, " n"]:
    """The features that fire most often, of those that fire at all, in the order of their indices."""
    counts = torch.bincount(feature_acts.features.cpu(), minlength=feature_acts.d_sae)
    order = counts.argsort(descending=True, stable=True)[:n_features]
    return order[counts[order] > 0].sort().values


def firing_together(feature_acts: SparseActs, features: Int[Tensor, " n"]) -> Float[Tensor, "n n"]:
    """Share of the tokens on which both of two features fire."""
    dense = torch.zeros(feature_acts.batch, len(features))
    place = torch.full((feature_acts.d_sae,), -1)
    place[features] = torch.arange(len(features))
    columns, rows = place[feature_acts.features.cpu()], feature_acts.rows.cpu()
    dense[rows[columns >= 0], columns[columns >= 0]] = 1.0
    return dense.T @ dense / max(feature_acts.batch, 1)


def pearson(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Pearson's r; NaN where one of them is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else float("nan")
