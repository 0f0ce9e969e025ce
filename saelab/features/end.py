"""One end of a feature: the tokens on which it is positive, or those on which it is negative.

Most SAEs have features that are never negative, with one end; a signed feature (AbsTopK, signed matching pursuit) is an axis
with two. Each end has numbers, examples and a unit of its own, counted in magnitudes.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from saelab.features import schema
from saelab.features.example import Example, read_examples

if TYPE_CHECKING:
    from saelab.features.feature import Feature


class Histogram(NamedTuple):
    """Exact counts of the non-zero values in log bins, four an octave."""

    edges: np.ndarray
    """`(n + 1,)` float64, ascending; of a feature with two ends one empty bin lies across zero"""
    counts: np.ndarray
    """`(n,)` int64; the outermost bins are not empty"""

    def mirrored(self) -> Histogram:
        """Of the negated values."""
        return Histogram(-self.edges[::-1], self.counts[::-1])


class Logits(NamedTuple):
    """Tokens that one unit of activation moves most: the direct effect on the logits, final norm gain folded in."""

    positive: list[tuple[str, float]]
    negative: list[tuple[str, float]]

    def mirrored(self) -> Logits:
        """Of one unit of negative activation."""
        return Logits(*([(token, -value) for token, value in side] for side in (self.negative, self.positive)))


class Steerable:
    """What can be given to `lm.steer`, once multiplied."""

    @property
    def handle(self) -> Any:
        """The `saelab.steering.FeatureHandle` behind the edits; loads the SAE on first use."""
        raise NotImplementedError

    def __mul__(self, strength: float) -> Any:
        """An edit that adds `strength` times p99: `with lm.steer(feature * 2.0)`. Positive strengths push towards the
        dominant end, or the one that was chosen."""
        return self.handle * strength

    __rmul__ = __mul__

    def add(self, value: float, unit: str = "p99") -> Any:
        """An edit that adds `value` in `unit` ("p99", "max", "mean", "raw") to the feature's activation."""
        return self.handle.add(value, unit=unit)

    def clamp(self, value: Any, unit: str = "p99", where: str = "always") -> Any:
        """An edit that sets the activation to `value`, everywhere or where it "fires"."""
        return self.handle.clamp(value, unit=unit, where=where)

    def scale(self, factor: float) -> Any:
        """An edit that multiplies the activation by `factor`."""
        return self.handle.scale(factor)

    def ablate(self) -> Any:
        """An edit that sets the activation to zero."""
        return self.handle.ablate()


class End(Steerable):
    """`feature.positive` or `feature.negative`. `mean`, `std`, `p99` and `max` are of the magnitudes at this end; edits count
    towards it, and `scale`, `ablate` and `clamp(where="fires")` leave the other end alone."""

    def __init__(self, feature: Feature, row: dict[str, Any]) -> None:
        self.feature = feature
        self.sign: Literal[-1, 1] = row["sign"]
        self.n_fired: int = row["n_fired"]
        self.density: float = self.n_fired / feature.store.n_tokens
        self.mean: float = row["mean"]
        self.std: float = row["std"]
        self.p99: float = row["p99"]
        self.max: float = row["max"]

    @property
    def name(self) -> str:
        """ "positive" or "negative"."""
        return "positive" if self.sign > 0 else "negative"

    def examples(self, limit: int | None = None) -> list[Example]:
        """The strongest examples at this end, one a document, strongest first."""
        return read_examples(self.feature.store, self.feature.feature, self.sign, limit)

    @cached_property
    def histogram(self) -> Histogram:
        """Of the magnitudes."""
        return read_histogram(self.feature.store.arrays(self.feature.feature, schema.blob_kind("histogram", self.sign)))

    @property
    def top_logits(self) -> Logits:
        """Tokens that the feature promotes and suppresses most where it fires at this end, by one unit of magnitude."""
        return self.feature.top_logits if self.sign > 0 else self.feature.top_logits.mirrored()

    @property
    def handle(self) -> Any:
        from saelab.steering import FeatureHandle

        store = self.feature.store
        units = {"p99": self.p99, "max": self.max, "mean": self.mean}
        return FeatureHandle(store.sae, self.feature.feature, store.hook_name, units=units, end=self.sign)

    def __repr__(self) -> str:
        return (
            f"<{self.name} end of feature {self.feature.feature}: fired on {self.n_fired:,} tokens, p99 {self.p99:.3g}>"
        )


def read_histogram(arrays: dict[str, np.ndarray]) -> Histogram:
    """The histogram of one end from its stored arrays; empty without any."""
    if not arrays:
        return Histogram(np.zeros(1), np.zeros(0, dtype=np.int64))
    first, counts = int(arrays["first"][0]), arrays["counts"].astype(np.int64)
    return Histogram(np.array(schema.bin_edges()[first : first + len(counts) + 1]), counts)
