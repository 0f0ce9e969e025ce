"""The words at the peaks of examples: the peak's token with the tokens that continue it to both sides."""

from __future__ import annotations

import re

from saelab.features.records import Example

_WORD = re.compile(r"[^\W\d_]{3,}|[^\W\d_\x00-\x7f]+")


def word_at_peak(example: Example) -> str:
    """The word, without the spaces around it; the token itself where it is none."""
    pieces = [piece.decode("utf-8", "replace") for piece in example.pieces]
    first, stop = example.peak, example.peak + 1
    while first > 0 and _continues(pieces[first - 1], pieces[first]):
        first -= 1
    while stop < len(pieces) and _continues(pieces[stop - 1], pieces[stop]):
        stop += 1
    return "".join(pieces[first:stop]).strip()


def _continues(before: str, after: str) -> bool:
    return before[-1:].isalnum() and after[:1].isalnum()


def is_word(text: str) -> bool:
    """Whether a text is three letters or more, or in another script than Latin one or more."""
    return _WORD.fullmatch(text) is not None
