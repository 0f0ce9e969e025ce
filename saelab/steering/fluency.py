"""How fluent a steered text is, as one factor from 0 to 1: it costs little likelihood, does not loop, and is no shorter packed.

Loops have a high likelihood, so likelihood alone would prefer them: "the the the the" is what a model expects after "the the".
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise

_FREE_NATS, _LAST_NATS = 0.75, 1.5
"""Nats per token above the unsteered text: at no cost, and worth nothing."""
_FREE_REPEATS, _LAST_REPEATS = 0.05, 0.35
"""Share of 4-grams that stood before."""
_FREE_ECHOES, _LAST_ECHOES = 0.05, 0.3
"""Share of tokens that repeat the one before."""
_FREE_RATIO, _LAST_RATIO = 0.6, 0.35
"""Length of the packed text by that of the text."""
_PACKER = 11
"""Bytes that zlib adds to any text."""
N = 4


def repeated_ngrams(ids: Sequence[int], n: int = N) -> float:
    """Share of the n-grams that stood earlier in the same text; 0 for a text of fewer tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def echoes(ids: Sequence[int]) -> float:
    """Share of the tokens that are the same as the one before; 0 for a single token."""
    pairs = list(pairwise(ids))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0


def distinct_ngrams(texts: Sequence[Sequence[int]], n: int = 2) -> float:
    """Share of the n-grams of several texts that differ: their diversity. 1 without any n-gram."""
    grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def zlib_ratio(text: str) -> float:
    """Bytes of the text packed by zlib, without what any text costs, by its bytes; 1 for an empty text."""
    raw = text.encode()
    return (len(zlib.compress(raw, 9)) - _PACKER) / len(raw) if raw else 1.0


def fluency(nll_cost: float, ids: Sequence[int], text: str) -> float:
    """The product of four factors: `nll_cost` (nats per token above the unsteered text), 4-grams that repeat, tokens that repeat
    the one before, and how far the text can be packed. Each is 1 up to a free amount and falls linearly to 0."""
    return (
        _falling(nll_cost, _FREE_NATS, _LAST_NATS)
        * _falling(repeated_ngrams(ids), _FREE_REPEATS, _LAST_REPEATS)
        * _falling(echoes(ids), _FREE_ECHOES, _LAST_ECHOES)
        * _falling(-zlib_ratio(text), -_FREE_RATIO, -_LAST_RATIO)
    )


def _falling(value: float, free: float, last: float) -> float:
    """1 up to `free`, 0 from `last` on."""
    return min(max((last - value) / (last - free), 0.0), 1.0)
