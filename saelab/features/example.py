"""Examples of a feature: stretches of held-out documents around the tokens on which it fires most strongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from saelab.features import schema
from saelab.features.token_text import display_groups, trim_to_characters

if TYPE_CHECKING:
    from saelab.features.store import FeatureStore


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


def read_examples(store: FeatureStore, feature: int, sign: int, limit: int | None) -> list[Example]:
    """The strongest examples at one end, one a document, strongest first; all that are stored, or `limit` of them."""
    if limit is not None and limit < 0:
        raise ValueError(f"limit={limit} is negative.")
    arrays = store.arrays(feature, schema.blob_kind("examples", sign))
    count = len(arrays.get("value", ()))
    return [_example(store, arrays, i) for i in range(count if limit is None else min(limit, count))]


def _example(store: FeatureStore, arrays: dict[str, np.ndarray], i: int) -> Example:
    sequence, position = int(arrays["sequence"][i]), int(arrays["position"][i])
    ids = store.sequence(sequence)
    start, stop = max(0, position - schema.WINDOW_LEFT), min(len(ids), position + schema.WINDOW_RIGHT + 1)
    pieces = store.pieces(ids[start:stop].tolist())
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
