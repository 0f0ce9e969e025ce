"""The words of the collected text: which word each token belongs to, how it is spelled and what its stem is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from saelab.features.visible import SPACE, visible

_LONGEST = 6
"""Tokens of a word; more are no word but a script without spaces, where a token stands for itself."""
_ENDINGS = ("'s", "\u2019s", "ies", "ing", "ed", "es", "ly", "s")


class Words:
    """Words of a text of token ids `(n_contexts, ctx_len)`; `pieces` are the bytes of each id.

    A word is a run of tokens that continue each other with letters or digits; any other token is a word of its own.
    """

    def __init__(self, ids: np.ndarray, pieces: Mapping[int, bytes]) -> None:
        self.ids = ids.reshape(-1)
        self.ctx_len = ids.shape[1]
        self._pieces = pieces
        self._spelled: dict[bytes, str] = {}
        self._stems: dict[str, str] = {}
        largest = max(pieces, default=0) + 1
        begins, ends = np.zeros(largest, dtype=bool), np.zeros(largest, dtype=bool)
        for index, piece in pieces.items():
            text = piece.decode("utf-8", "replace")  # half a character is one that goes on
            begins[index], ends[index] = (char.isalnum() or char == "\ufffd" for char in (text[:1], text[-1:]))
        goes_on = np.zeros(len(self.ids), dtype=bool)
        goes_on[1:] = begins[self.ids[1:]] & ends[self.ids[:-1]]
        goes_on[:: self.ctx_len] = False
        starts = np.flatnonzero(~goes_on)
        self._number = np.cumsum(~goes_on) - 1
        self._first, self._stop = starts, np.append(starts[1:], len(self.ids))

    def span(self, token: int) -> tuple[int, int]:
        """First and last-plus-one token of the word that a token belongs to."""
        number = self._number[token]
        first, stop = int(self._first[number]), int(self._stop[number])
        return (first, stop) if stop - first <= _LONGEST else (token, token + 1)

    def word(self, token: int) -> str:
        """The word that a token belongs to, without the spaces around it."""
        return self._spell(*self.span(token))

    def text(self, first: int, stop: int) -> str:
        """The text of some tokens."""
        joined = b"".join(self._pieces.get(int(index), b"") for index in self.ids[first:stop])
        return joined.decode("utf-8", "backslashreplace")

    def token_text(self, token: int) -> str:
        """The text of one token."""
        return self.text(token, token + 1)

    def stem(self, word: str) -> str:
        """The word in lower case without its ending."""
        if word not in self._stems:
            self._stems[word] = stem_of(word)
        return self._stems[word]

    def frequencies(self, most: int = 200_000) -> tuple[Counter[str], int]:
        """How often each stem occurs among the words of the first `most` tokens, and the number of these words."""
        counts: Counter[str] = Counter()
        last = int(self._number[min(most, len(self.ids)) - 1]) + 1 if len(self.ids) else 0
        for first, stop in zip(self._first[:last].tolist(), self._stop[:last].tolist(), strict=True):
            counts[self.stem(self._spell(first, min(stop, first + _LONGEST)))] += 1
        return counts, last

    def _spell(self, first: int, stop: int) -> str:
        key = self.ids[first:stop].tobytes()
        if key not in self._spelled:
            text = self.text(first, stop)
            self._spelled[key] = text.strip() or visible(text).replace(" ", SPACE)
        return self._spelled[key]


def stem_of(word: str) -> str:
    """A word in lower case without its ending."""
    word = word.casefold()
    bare = word.strip("\"'()[]{}.,;:!?-\u201c\u201d\u2018\u2019\u2014_*#") or word
    for ending in _ENDINGS:
        if bare.endswith(ending) and len(bare) - len(ending) >= 3:
            return bare[: -len(ending)]
    return bare
