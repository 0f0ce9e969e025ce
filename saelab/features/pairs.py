"""The pairs of features in a matching, chosen and ordered for a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from saelab.features.changes import changes
from saelab.features.matching import COUNTERPART, Matching

SHOWS = ("all", "mutual", "only_a", "only_b", "split", "merged")
ORDERS = ("unlike", "alike", "apart", "together", "index")


class Pair(NamedTuple):
    """A feature of a and one of b."""

    a: int
    b: int
    """-1: nothing of the other SAE fired; so may `a` be."""
    cosine: float
    jaccard: float
    """NaN where neither fires on the tokens that both stores sampled."""
    mutual: bool
    """Whether each is the most similar one of the other."""


def pairs(matching: Matching, show: str = "all", order: str = "unlike", cosine: float = COUNTERPART) -> list[Pair]:
    """Pairs of a matching, in an order.

    `show="all"`: each feature of a that fired, and the most similar of b; "mutual": only where that holds both ways; "only_a",
    "only_b": features without a counterpart, and the most similar of the other; "split", "merged": as in `changes`. `cosine` is
    the smallest of a counterpart. `order`: by cosine ("unlike" first, "alike" first), by the Jaccard of their firings ("apart",
    "together"; unknown last), or by "index". Raises `ValueError` for another `show` or `order`.
    """
    if show not in SHOWS or order not in ORDERS:
        raise ValueError(
            f"show={show!r}, order={order!r}: expected one of {', '.join(SHOWS)} and one of {', '.join(ORDERS)}."
        )
    of_a, of_b = matching.of_a, matching.of_b
    if show in ("only_b", "split"):
        groups = changes(matching, cosine).split.values()
        b = of_b.missing(cosine) if show == "only_b" else _joined(groups)
        a, similarity, jaccard = of_b.best[b], of_b.cosine[b], of_b.jaccard[b]
    else:
        groups = changes(matching, cosine).merged.values()
        chosen = {"all": of_a.alive, "mutual": matching.mutual, "only_a": of_a.alive & ~of_a.found(cosine)}
        a = _joined(groups) if show == "merged" else np.flatnonzero(chosen[show])
        b, similarity, jaccard = of_a.best[a], of_a.cosine[a], of_a.jaccard[a]
    mutual = (a >= 0) & (b >= 0) & (of_a.best[a] == b) & (of_b.best[b] == a)
    key = {"unlike": similarity, "alike": -similarity, "apart": jaccard, "together": -jaccard, "index": a}[order]
    rows = np.lexsort((b, a, key))
    columns = (column[rows].tolist() for column in (a, b, similarity, jaccard, mutual))
    return [Pair(*values) for values in zip(*columns, strict=True)]


def _joined(groups: Iterable[list[int]]) -> np.ndarray:
    return np.array([feature for group in groups for feature in group], dtype=np.int64)
