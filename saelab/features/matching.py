"""Matches the features of two SAEs: for each of one the most similar of the other, and how far both fire on the same tokens.

Needs neither torch nor a model. Similarity is the cosine of decoder rows, so both SAEs must write to a stream of one width; that
two rows point the same way means most where it is also the same stream of the same model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saelab.features.decoders import by_source
from saelab.features.search import unit_rows
from saelab.features.store import FeatureStore

if TYPE_CHECKING:
    from saelab.saes import SAE

BLOCK = 2**25
"""Cosines computed at a time: 128 MB."""
COUNTERPART = 0.7
"""The smallest decoder cosine of two features that count as counterparts."""


class Counterparts(NamedTuple):
    """For each feature of one SAE its most similar feature of the other, and how they fire; each `(d_sae,)`."""

    best: np.ndarray
    """Index in the other SAE, int64; -1 for a feature that never fired, and where nothing of the other did."""
    cosine: np.ndarray
    """Of the two decoder rows, float32; NaN where `best` is -1."""
    jaccard: np.ndarray
    """Shared tokens on which both fire over those on which either does, float64; NaN where neither fires."""
    within: np.ndarray
    """The share of this feature's firings on which the other fires as well; NaN where this one does not fire."""
    n_fired: np.ndarray
    """Shared tokens on which this feature fires, int64."""
    alive: np.ndarray
    """Whether it fired on any token of its store, bool; True for all where an SAE was given."""

    def found(self, cosine: float = COUNTERPART) -> np.ndarray:
        """Which features have a counterpart at least that similar, bool."""
        return np.nan_to_num(self.cosine, nan=-2.0) >= cosine

    def missing(self, cosine: float = COUNTERPART) -> np.ndarray:
        """The features that fired and have no counterpart that similar, the least similar first."""
        lone = np.flatnonzero(self.alive & ~self.found(cosine))
        return lone[np.argsort(self.cosine[lone], kind="stable")]


class Matching(NamedTuple):
    """Two SAEs, a and b, matched in both directions."""

    of_a: Counterparts
    of_b: Counterparts
    n_shared: int
    """Tokens that both stores sampled; 0 where they read other texts, or where SAEs were given."""

    @property
    def mutual(self) -> np.ndarray:
        """Which features of a are the most similar one of their most similar one, `(d_sae_a,)` bool."""
        best = self.of_a.best
        return (best >= 0) & (self.of_b.best[best] == np.arange(len(best)))

    @property
    def median_jaccard(self) -> float | None:
        """The median Jaccard of the pairs that are mutual; None where no firings of any are known."""
        known = self.of_a.jaccard[self.mutual]
        known = known[~np.isnan(known)]
        return float(np.median(known)) if len(known) else None


def match(a: FeatureStore | SAE, b: FeatureStore | SAE) -> Matching:
    """Match two SAEs of the same width, given as feature stores or as SAEs, by exact search.

    Of stores, only features that fired on their text are matched (the rows of others were hardly trained), and their firings are
    compared on the tokens that both stores sampled: those of the same contexts, whatever else either of them read. All sources of
    a crosscoder count as one row. Raises `ValueError` if the widths differ.
    """
    rows = [_decoder_rows(one) for one in (a, b)]
    if rows[0].shape[1] != rows[1].shape[1]:
        raise ValueError(
            f"The decoder rows have widths {rows[0].shape[1]} and {rows[1].shape[1]}: only SAEs that write to streams of the "
            "same width can be matched."
        )
    alive = [_alive(one, len(rows_of)) for one, rows_of in zip((a, b), rows, strict=True)]
    best_a, cosine_a, best_b, cosine_b = _most_similar(rows[0], rows[1], *alive)
    firings = shared_firings(a, b) if isinstance(a, FeatureStore) and isinstance(b, FeatureStore) else None
    if firings is None:
        firings = (Firings.none(len(rows[0])), Firings.none(len(rows[1])), 0)
    of_a, of_b, n_shared = firings
    return Matching(
        Counterparts(best_a, cosine_a, *_overlap(of_a, of_b, best_a), of_a.counts, alive[0]),
        Counterparts(best_b, cosine_b, *_overlap(of_b, of_a, best_b), of_b.counts, alive[1]),
        n_shared,
    )


class Firings(NamedTuple):
    """On which of the shared tokens each feature fires: by feature, then token."""

    feature: np.ndarray
    token: np.ndarray
    counts: np.ndarray

    @classmethod
    def none(cls, d_sae: int) -> Firings:
        empty = np.zeros(0, dtype=np.int64)
        return cls(empty, empty, np.zeros(d_sae, dtype=np.int64))


def shared_firings(a: FeatureStore, b: FeatureStore) -> tuple[Firings, Firings, int] | None:
    """The firings of both stores on the tokens that both sampled, and the number of these; None where they share none.

    Both keep the tokens of smallest hash of their number, so those of the store that sampled fewer are among those of the other.
    Only contexts with the same ids at the same number count.
    """
    if min(a.manifest["version"], b.manifest["version"]) < 3:
        return None
    ids_a, ids_b = a.contexts, b.contexts
    if ids_a.shape[1] != ids_b.shape[1]:
        return None
    n = min(len(ids_a), len(ids_b))
    same = (ids_a[:n] == ids_b[:n]).all(1)
    tokens = np.intersect1d(a.sample["tokens"], b.sample["tokens"], assume_unique=True)
    context = tokens // ids_a.shape[1]
    tokens = tokens[context < n]
    tokens = tokens[same[tokens // ids_a.shape[1]]]
    return (_firings(a, tokens), _firings(b, tokens), len(tokens)) if len(tokens) else None


def _firings(store: FeatureStore, tokens: np.ndarray) -> Firings:
    sample = store.sample
    feature = np.repeat(np.arange(store.d_sae), np.diff(sample["feature_offsets"]))
    rows = sample["by_feature"]
    place = np.searchsorted(tokens, sample["tokens"]).clip(max=len(tokens) - 1)
    shared = (tokens[place] == sample["tokens"])[rows]
    feature = feature[shared]
    return Firings(feature, place[rows[shared]], np.bincount(feature, minlength=store.d_sae))


def _overlap(this: Firings, other: Firings, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard of each feature and its best, and the share of this feature's firings on which the best fires."""
    n = 1 + max(this.token.max(initial=0), other.token.max(initial=0))
    known = other.feature * n + other.token  # ascending
    wanted = best[this.feature] * n + this.token
    place = np.searchsorted(known, wanted).clip(max=max(len(known) - 1, 0))
    hit = (known[place] == wanted) if len(known) else np.zeros(len(wanted), dtype=bool)
    both = np.bincount(this.feature[hit], minlength=len(best)).astype(np.float64)
    matched = best >= 0
    either = this.counts + np.where(matched, other.counts[best], 0) - both
    with np.errstate(invalid="ignore", divide="ignore"):
        jaccard, within = both / either, both / this.counts
    return np.where(matched, jaccard, np.nan), np.where(matched, within, np.nan)


def _decoder_rows(one: Any) -> np.ndarray:
    """Decoder rows of norm 1, `(d_sae, width)` float32."""
    if isinstance(one, FeatureStore):
        return one.directions("decoder")
    return unit_rows(by_source(one.W_dec.detach().float().cpu().numpy(), one.d_sae))


def _alive(one: Any, d_sae: int) -> np.ndarray:
    return one.column("n_fired") > 0 if isinstance(one, FeatureStore) else np.ones(d_sae, dtype=bool)


def _most_similar(
    a: np.ndarray, b: np.ndarray, alive_a: np.ndarray, alive_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Index and cosine of the most similar row, of a in b and of b in a; the smaller index wins a tie."""
    here, there = np.flatnonzero(alive_a), np.flatnonzero(alive_b)
    best_a, best_b = np.full(len(a), -1), np.full(len(b), -1)
    cosine_a, cosine_b = (np.full(len(rows), np.nan, dtype=np.float32) for rows in (a, b))
    if not len(here) or not len(there):
        return best_a, cosine_a, best_b, cosine_b
    columns, largest = b[there], np.full(len(there), -np.inf, dtype=np.float32)
    for rows in _blocks(here, max(BLOCK // len(there), 1)):
        cosines = a[rows] @ columns.T
        nearest = cosines.argmax(1)
        best_a[rows], cosine_a[rows] = there[nearest], cosines[np.arange(len(rows)), nearest]
        nearest = cosines.argmax(0)
        found = cosines[nearest, np.arange(len(there))]
        better = found > largest
        largest[better], best_b[there[better]] = found[better], rows[nearest[better]]
    cosine_b[there] = largest
    return best_a, cosine_a.clip(-1, 1), best_b, cosine_b.clip(-1, 1)


def _blocks(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (indices[start : start + size] for start in range(0, len(indices), size))
