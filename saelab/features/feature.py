"""One feature of a store: its numbers and examples to look at, and the same object to steer with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saelab.features import schema
from saelab.features.token_text import display_groups, trim_to_characters

if TYPE_CHECKING:
    from saelab.features.store import FeatureStore


@dataclass(frozen=True)
class Example:
    """A stretch of one held-out document around a token on which the feature fires strongly.

    `value` is the activation at the peak, `values[i]` the one on token `token_ids[i]` (0 where it is silent or masked),
    `peak` the index of the peak in these lists; `pieces` are the tokens' bytes. `document`, `sequence` and `position`
    say where the peak lies in the pass.
    """

    value: float
    document: int
    sequence: int
    position: int
    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]
    values: tuple[float, ...]
    peak: int

    @property
    def text(self) -> str:
        """The text, byte-exact where the tokens are whole characters."""
        return "".join(group.text for group in display_groups(self.pieces))


class Histogram(NamedTuple):
    """Exact counts of the non-zero values (of their magnitudes, where negative) in log bins, four an octave."""

    edges: np.ndarray
    """`(n + 1,)` float64"""
    counts: np.ndarray
    """`(n,)` int64; the outermost bins are not empty"""


class Logits(NamedTuple):
    """Tokens the decoder row moves most: the direct effect on the logits, final norm gain folded in."""

    positive: list[tuple[str, float]]
    negative: list[tuple[str, float]]


class Feature:
    """A feature as `store.feature(i)` gives it; a card in a notebook, an edit when multiplied.

    Numbers are taken over the counted tokens: `n_fired`, `density` (share of tokens with a non-zero value), and over
    the non-zero values: `mean`, `std`, `p99`, `max` (None when it never fired). `cosine`: encoder to decoder row.
    """

    def __init__(self, store: FeatureStore, row: dict[str, Any]) -> None:
        self.store = store
        self.row = row
        self.feature: int = row["feature"]
        self.hook_name = store.hook_name
        self.n_fired: int = row["n_fired"]
        self.density: float = row["density"]
        self.mean: float | None = row["mean"]
        self.std: float | None = row["std"]
        self.p99: float | None = row["p99"]
        self.max: float | None = row["max"]
        self.cosine: float | None = row["cosine"]

    def examples(self, limit: int | None = None) -> list[Example]:
        """The strongest examples, one a document, strongest first; all that are stored, or `limit` of them."""
        if limit is not None and limit < 0:
            raise ValueError(f"limit={limit} is negative.")
        arrays = self.store.arrays(self.feature, "examples")
        count = len(arrays.get("value", ()))
        return [self._example(arrays, i) for i in range(count if limit is None else min(limit, count))]

    def _example(self, arrays: dict[str, np.ndarray], i: int) -> Example:
        sequence, position = int(arrays["sequence"][i]), int(arrays["position"][i])
        ids = self.store.sequence(sequence)
        start, stop = max(0, position - schema.WINDOW_LEFT), min(len(ids), position + schema.WINDOW_RIGHT + 1)
        pieces = self.store.pieces(ids[start:stop].tolist())
        left, right = trim_to_characters(pieces, position - start)
        start, stop, pieces = start + left, start + right, pieces[left:right]
        first = schema.WINDOW_LEFT + start - position  # window column 32 is the peak
        values = arrays["window"][i, first : first + stop - start]
        return Example(
            value=float(arrays["value"][i]),
            document=int(arrays["document"][i]),
            sequence=sequence,
            position=position,
            token_ids=tuple(ids[start:stop].tolist()),
            pieces=tuple(pieces),
            values=tuple(values.tolist()),
            peak=position - start,
        )

    @cached_property
    def histogram(self) -> Histogram:
        """Exact log-histogram of the values; empty when the feature never fired."""
        arrays = self.store.arrays(self.feature, "histogram")
        if not arrays:
            return Histogram(np.zeros(1), np.zeros(0, dtype=np.int64))
        first, counts = int(arrays["first"][0]), arrays["counts"].astype(np.int64)
        return Histogram(np.array(schema.bin_edges()[first : first + len(counts) + 1]), counts)

    @cached_property
    def top_logits(self) -> Logits:
        """Tokens that one unit along the decoder row promotes and suppresses most; empty off the residual stream."""
        arrays = self.store.arrays(self.feature, "logits")
        if not arrays:
            return Logits([], [])
        return Logits(self._side(arrays, "positive"), self._side(arrays, "negative"))

    def _side(self, arrays: dict[str, np.ndarray], side: str) -> list[tuple[str, float]]:
        texts = [
            piece.decode("utf-8", "backslashreplace") for piece in self.store.pieces(arrays[f"{side}_ids"].tolist())
        ]
        return list(zip(texts, arrays[side].tolist(), strict=True))

    @property
    def handle(self) -> Any:
        """The `saelab.steering.FeatureHandle` behind the edits; loads the SAE on first use."""
        from saelab.steering import FeatureHandle

        units = {"p99": self.p99, "max": self.max, "mean": self.mean}
        known = {name: value for name, value in units.items() if value is not None}
        return FeatureHandle(self.store.sae, self.feature, self.hook_name, units=known)

    def __mul__(self, strength: float) -> Any:
        """An edit that adds `strength` times the feature's p99 activation: `with lm.steer(feature * 2.0)`."""
        return self.handle * strength

    __rmul__ = __mul__

    def add(self, value: float, unit: str = "p99") -> Any:
        """An edit that adds `value` in `unit` ("p99", "max", "mean", "raw") to the feature's activation."""
        return self.handle.add(value, unit=unit)

    def clamp(self, value: Any, unit: str = "p99", where: str = "always") -> Any:
        """An edit that sets the activation to `value`, everywhere or where the feature "fires"."""
        return self.handle.clamp(value, unit=unit, where=where)

    def scale(self, factor: float) -> Any:
        """An edit that multiplies the activation by `factor`."""
        return self.handle.scale(factor)

    def ablate(self) -> Any:
        """An edit that sets the activation to zero."""
        return self.handle.ablate()

    def __repr__(self) -> str:
        from saelab.features.render import feature_text

        return feature_text(self)

    def _repr_html_(self) -> str:
        from saelab.features.render import feature_card

        return feature_card(self)
