"""What a store says of a feature, as plain records; `reader.py` makes them, `render.py` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from saelab.features.token_text import display_groups


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


@dataclass(frozen=True)
class Example:
    """A stretch of one held-out document around a token on which the feature fires strongly.

    `value` is the activation at the peak (negative at a feature's negative end), `values[i]` the one on token `token_ids[i]`
    (0 where it is silent or masked), `peak` the index of the peak in these lists; `pieces` are the tokens' bytes. `document`,
    `sequence` and `position` say where the peak lies in the pass.
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


@runtime_checkable
class EndNumbers(Protocol):
    """One end of a feature: the sign it fires with there, and its numbers over the magnitudes."""

    n_fired: int
    p99: float
    max: float

    @property
    def sign(self) -> int: ...
    @property
    def name(self) -> str: ...


@runtime_checkable
class FeatureNumbers(Protocol):
    """What a card shows of a feature (`feature.Feature`)."""

    feature: int
    hook_name: str
    n_fired: int
    density: float
    sign: int | None
    mean: float | None
    p99: float | None
    max: float | None
    cosine: float | None

    @property
    def store(self) -> Any: ...
    @property
    def ends(self) -> Sequence[EndNumbers]: ...
    @property
    def histogram(self) -> Histogram: ...
    @property
    def dominant_logits(self) -> Logits: ...
    def examples(self, limit: int | None = None, *, kind: str = "top") -> list[Example]: ...
