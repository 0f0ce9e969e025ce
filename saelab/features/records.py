"""Plain records of what a store holds about a feature: `reader.py` returns them, `render.py` renders them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from saelab.features.token_text import display_groups


class Histogram(NamedTuple):
    """Exact counts of non-zero values in log bins, four per octave."""

    edges: np.ndarray
    """`(n + 1,)` float64, ascending; for a feature with two ends, one empty bin spans zero"""
    counts: np.ndarray
    """`(n,)` int64; the outermost bins are not empty"""

    def mirrored(self) -> Histogram:
        """The histogram of the negated values."""
        return Histogram(-self.edges[::-1], self.counts[::-1])


class Logits(NamedTuple):
    """Tokens whose logits one unit of activation changes most: its direct effect, with the final norm's gain folded in."""

    positive: list[tuple[str, float]]
    negative: list[tuple[str, float]]

    def mirrored(self) -> Logits:
        """The logits per unit of negative activation."""
        return Logits(*([(token, -value) for token, value in side] for side in (self.negative, self.positive)))


class PromotedToken(NamedTuple):
    """A token whose logit the decoder row of a feature changes unusually much."""

    text: str
    z: float | None
    """That change as a z-score among the changes by all features; None in a store of an earlier saelab."""
    logit: float | None
    """The change per unit of activation, its direct effect as in `Logits`; None where a store does not hold it."""


class Promoted(NamedTuple):
    """Tokens that a decoder row promotes and suppresses most, as z-scores: tokens that most features push are left out."""

    positive: list[PromotedToken]
    negative: list[PromotedToken]

    def mirrored(self) -> Promoted:
        """Those per unit of negative activation."""
        return Promoted(*([_negated(token) for token in side] for side in (self.negative, self.positive)))


def _negated(token: PromotedToken) -> PromotedToken:
    return PromotedToken(token.text, *(None if value is None else -value for value in token[1:]))


@dataclass(frozen=True)
class Example:
    """A window of one context around a token on which the feature fires strongly.

    `value` is the feature's activation at the peak (negative at its negative end), `values[i]` that on token `token_ids[i]`
    (0 where it is silent or masked), `peak` the index of the peak in these tuples; `pieces` are the tokens' bytes.
    `document`, `sequence` (the number of the context) and `position` locate the peak in the pass, `document_position` in its
    document (None in a store of an earlier saelab). `quantile` are the shares of firings between which the example lies,
    where it was chosen for that. A near miss did not fire: `value` is what it lacked, 0 or less.
    """

    value: float
    document: int
    sequence: int
    position: int
    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]
    values: tuple[float, ...]
    peak: int
    document_position: int | None = None
    quantile: tuple[float, float] | None = None
    store: Any = field(default=None, repr=False, compare=False)

    @property
    def where(self) -> tuple[int, int]:
        """The context of the peak, and its position in it."""
        return self.sequence, self.position

    @property
    def place(self) -> str:
        """Its document and the token's number there (in its context, in a store of an earlier saelab): "128:45"."""
        return f"{self.document}:{self.position if self.document_position is None else self.document_position}"

    @property
    def text(self) -> str:
        """The text, byte-exact where the tokens are whole characters."""
        return "".join(group.text for group in display_groups(self.pieces))

    def document_text(self) -> str:
        """The text of its whole document, as far as the pass read it; `store.document(example.document)` has the tokens."""
        return self.store.document(self.document).text


@runtime_checkable
class EndNumbers(Protocol):
    """One end of a feature: its sign, and its metrics over the magnitudes."""

    n_fired: int
    p99: float
    max: float

    @property
    def sign(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def histogram(self) -> Histogram: ...


@runtime_checkable
class FeatureNumbers(Protocol):
    """The interface of `feature.Feature` that a card renders."""

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
    def label(self) -> str | None: ...
    @property
    def ends(self) -> Sequence[EndNumbers]: ...
    @property
    def histogram(self) -> Histogram: ...
    @property
    def promoted(self) -> Promoted: ...
    def examples(self, limit: int | None = None, *, kind: str = "top") -> list[Example]: ...
