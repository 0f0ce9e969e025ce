"""A whole document of a feature store: an example shows a window of it, this what stands around."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from saelab.features.records import Example
from saelab.features.token_text import display_groups


@dataclass(frozen=True, eq=False)
class Document:
    """The tokens of one document, as far as the store's pass read it, without the BOS that packing put between them.

    `context (n,)` and `position (n,)` are the context of each token and its place there.
    """

    number: int
    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]
    context: np.ndarray
    position: np.ndarray

    @property
    def text(self) -> str:
        """The text, byte-exact where the tokens are whole characters."""
        return "".join(group.text for group in display_groups(self.pieces))

    def __repr__(self) -> str:
        return f"Document({self.number}: {len(self.token_ids):,} tokens, {self.text[:60]!r} ...)"

    def around(self, example: Example) -> tuple[Example, int, int]:
        """The document as one long example, with the values that are stored for `example`, and the tokens `start` to `stop` - 1
        that have them. Raises `ValueError` for an example of another document."""
        first = example.position - example.peak
        column = self.position - first  # of the window
        has = (self.context == example.where[0]) & (column >= 0) & (column < len(example.values))
        peak = np.flatnonzero(has & (column == example.peak))
        if not len(peak):
            raise ValueError(f"The example is of document {example.document}, not of document {self.number}.")
        values = np.zeros(len(self.token_ids))
        values[has] = np.asarray(example.values)[column[has]]
        where = np.flatnonzero(has)
        full = replace(
            example, document=self.number, token_ids=self.token_ids, pieces=self.pieces, values=tuple(values.tolist()),
            peak=int(peak[0]),
        )  # fmt: skip
        return full, int(where[0]), int(where[-1]) + 1


def tokens_of(docs: np.ndarray, number: int, n_start: int) -> tuple[np.ndarray, np.ndarray]:
    """Context and position of each token of a document in `docs (n_contexts, ctx_len)`, whose first `n_start` tokens of a context
    (BOS) belong to none."""
    rows = np.flatnonzero((docs[:, n_start:] == number).any(1))
    row, column = np.nonzero(docs[rows, n_start:] == number)
    return rows[row], column + n_start
