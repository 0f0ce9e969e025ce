"""Which features tell two sets of texts apart; `text_sets.py` reads them.

The unit is a text: a feature fires in it or it does not, however often. The shares of both sets are compared by their
difference, with Newcombe's 95 % interval, and by Fisher's exact test, whose p values are corrected over all features that fired
(Benjamini and Hochberg).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from saelab.features.intervals import benjamini_hochberg, fisher, newcombe
from saelab.features.search import Search

MIN_TEXTS = 10
"""In each set, for a claim: then a feature that fires in all of one and none of the other has p = 1.1e-5, which is a discovery
among up to 4,600 features. With 5 and 5 texts it has p = 0.008, as some of a thousand features have by chance."""
ALPHA = 0.05


class Side(NamedTuple):
    """What the features do in one set of texts."""

    n_texts: int
    """Different texts with at least one counted token."""
    n_left_out: int
    """Texts that came twice, or hold no counted token."""
    n_fired: np.ndarray
    """`(d_sae,)` int64: texts in which the feature fires (is not zero on some counted token)."""
    mean: np.ndarray
    """`(d_sae,)` float64: mean over the texts of its mean activation over a text's counted tokens, zeros included."""

    @property
    def share(self) -> np.ndarray:
        return self.n_fired / self.n_texts


@dataclass(frozen=True)
class Contrast:
    """The comparison of two sets of texts, of each feature: arrays `(d_sae,)` float64."""

    store: Search
    a: Side
    b: Side
    difference: np.ndarray
    """Share of texts in which it fires, in a minus in b."""
    low: np.ndarray
    high: np.ndarray
    """Ends of the 95 % interval of `difference`, for one feature looked at alone."""
    p: np.ndarray
    q: np.ndarray
    """NaN where a feature fired in no text."""

    @property
    def n_tested(self) -> int:
        """Features that fired in at least one text."""
        return int((self.a.n_fired + self.b.n_fired > 0).sum())

    @property
    def enough(self) -> bool:
        """Whether there are `MIN_TEXTS` in both sets; with fewer, nothing is `found`."""
        return min(self.a.n_texts, self.b.n_texts) >= MIN_TEXTS

    @property
    def found(self) -> np.ndarray:
        """`(d_sae,)` bool: features of which a difference is claimed, q at most 0.05."""
        return np.nan_to_num(self.q, nan=1.0) <= (ALPHA if self.enough else -1.0)

    @property
    def summary(self) -> str:
        """What may be concluded, in a sentence."""
        read = f"{self.a.n_texts:,} and {self.b.n_texts:,} texts, {self.n_tested:,} features fired in them"
        if left_out := self.a.n_left_out + self.b.n_left_out:
            read += f" ({left_out:,} texts left out: they came twice, or have no counted token)"
        if not self.enough:
            return (
                f"{read}. No claim is made with fewer than {MIN_TEXTS} texts in each set: among so many features, some differ "
                "as much by chance. Take this as a hint where to look, and add texts."
            )
        n = int(self.found.sum())
        if not n:
            return (
                f"{read}. No feature differs by more than chance would make one of so many differ (q at most {ALPHA})."
            )
        return f"{read}; {n:,} differ at a false discovery rate of {ALPHA:.0%}."

    def rows(self, limit: int = 25, more_in: str = "a") -> list[dict[str, Any]]:
        """The features that fire in more texts of one set, the largest difference first (then the smallest p, then the largest
        difference of means): dicts with "feature", "label", "n_a", "n_b", "share_a", "share_b", "difference", "low", "high",
        "mean_a", "mean_b", "p", "q" and "found"."""
        if more_in not in ("a", "b"):
            raise ValueError(f"more_in={more_in!r} is unknown; expected 'a' or 'b'.")
        sign = 1 if more_in == "a" else -1
        order = np.lexsort((-sign * (self.a.mean - self.b.mean), self.p, -sign * self.difference))
        chosen = [int(i) for i in order[:limit] if sign * self.difference[i] > 0]
        labels, known = self.store.labels, {row["feature"]: row["label"] for row in self.store.rows_of(chosen)}
        columns = {
            "n_a": self.a.n_fired, "n_b": self.b.n_fired, "share_a": self.a.share, "share_b": self.b.share,
            "difference": self.difference, "low": self.low, "high": self.high, "mean_a": self.a.mean, "mean_b": self.b.mean,
            "p": self.p, "q": self.q, "found": self.found,
        }  # fmt: skip
        return [
            {"feature": i, "label": labels.get(i) or known[i], **{name: one[i].item() for name, one in columns.items()}}
            for i in chosen
        ]


def compare(store: Search, a: Side, b: Side) -> Contrast:
    """The comparison of two sets whose features have been counted."""
    tested = a.n_fired + b.n_fired > 0
    low, high = newcombe(a.n_fired, a.n_texts, b.n_fired, b.n_texts)
    p, q = (np.full(len(tested), np.nan) for _ in range(2))
    p[tested] = fisher(a.n_fired[tested], a.n_texts, b.n_fired[tested], b.n_texts)
    q[tested] = benjamini_hochberg(p[tested])
    return Contrast(store, a, b, a.share - b.share, low, high, p, q)


def lines(text: str) -> list[str]:
    """The texts that stand one in each line."""
    return [line.strip() for line in text.split("\n") if line.strip()]
