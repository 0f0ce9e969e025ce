"""The two sides of a crosscoder: how strongly each feature writes to one source and to the other, and whether in one direction.

As `saelab.evaluation.compare_decoders`, which it agrees with, but from a feature store and without torch. A feature whose decoder
row has a small norm at a source need not be absent there: `saelab.evaluation.latent_scaling` checks that on activations.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from saelab.features.search import Search

CLASSES = ("a only", "shared", "b only", "other")
ONE_SIDE, SHARED = 0.1, 0.4
"""Relative norms below and above which a feature is of one side only, and shared (Minder et al. 2025, arXiv 2504.02922)."""


class Sides(NamedTuple):
    """Decoder rows at two sources, a and b, feature by feature; each `(d_sae,)`, in the units of the weights."""

    norm_a: np.ndarray
    norm_b: np.ndarray
    relative: np.ndarray
    """`((|d_b| - |d_a|) / max(|d_a|, |d_b|) + 1) / 2`: 0 only a, 0.5 both alike, 1 only b; NaN where both rows are zero."""
    cosine: np.ndarray
    """Between the two rows; NaN where one is zero."""

    @property
    def kind(self) -> np.ndarray:
        """Indices into `CLASSES`, `(d_sae,)`."""
        kind = np.full(len(self.relative), 3)
        kind[self.relative < ONE_SIDE] = 0
        kind[(self.relative >= SHARED) & (self.relative <= 1 - SHARED)] = 1
        kind[self.relative > 1 - ONE_SIDE] = 2
        return kind

    def features(self, kind: str = "") -> np.ndarray:
        """The features of a class (all of them for ""), from those of a only to those of b only."""
        chosen = np.arange(len(self.relative)) if not kind else np.flatnonzero(self.kind == CLASSES.index(kind))
        return chosen[np.argsort(self.relative[chosen], kind="stable")]


def sources_of(store: Search) -> list[str]:
    """The hooks that a crosscoder reads, in order; [] for any other SAE."""
    if store.manifest["sae"].get("variant") != "crosscoder":
        return []
    return list(store.manifest.get("sites", {}).get("reads", []))


def sides(store: Search, a: int = 0, b: int = -1) -> Sides:
    """Compare the decoder rows of two sources of a crosscoder. Raises `ValueError` for another SAE, and for sources that it does
    not have or that are one and the same."""
    rows = store.weights["W_dec"]
    n_sources = len(rows) if rows.ndim == 3 else 1
    chosen = [source + n_sources if source < 0 else source for source in (a, b)]
    if not all(0 <= source < n_sources for source in chosen) or chosen[0] == chosen[1]:
        raise ValueError(f"sources {a} and {b} must be two different ones of the {n_sources} that this SAE has.")
    left, right = (rows[source].astype(np.float64) for source in chosen)
    norm_a, norm_b = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    with np.errstate(invalid="ignore"):
        relative = ((norm_b - norm_a) / np.maximum(norm_a, norm_b) + 1) / 2
        cosine = (left * right).sum(1) / (norm_a * norm_b)
    return Sides(norm_a, norm_b, relative, cosine)
