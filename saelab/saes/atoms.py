"""Where the atoms of an ITDA dictionary come from: a label for each, and a fingerprint of all rows that were read.

A label is two numbers: the id of the document that a row's token is in and the token's place in it; or, where rows are not from
a cache, -1 and the number of the row. Two dictionaries can be compared by their labels if both were built from the same tokens,
in the same order.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

NO_LABEL = -1
_MIX = (-7046029254386353131, -4417276706812531889)
_STEP = 6364136223846793005
"""Odd 64-bit constants (splitmix64, xxHash and Knuth's MMIX generator), as signed integers; products wrap around."""


def numbered(first: int, n: int) -> Int[Tensor, "n 2"]:
    """Labels of `n` rows that have no document: their numbers."""
    numbers = torch.arange(first, first + n)
    return torch.stack([torch.full_like(numbers, NO_LABEL), numbers], 1)


def extended(fingerprint: Int[Tensor, ""], labels: Int[Tensor, "n 2"]) -> Int[Tensor, ""]:
    """The fingerprint of a stream of rows after these rows: h = h * _STEP + mix(label), for one row after another."""
    if not len(labels):
        return fingerprint
    mixed = (labels * torch.tensor(_MIX, device=labels.device)).sum(1)
    mixed = (mixed ^ (mixed >> 29)) * _MIX[0] + 1
    powers = torch.full_like(mixed, _STEP).cumprod(0)  # _STEP ** 1 .. n
    return fingerprint * powers[-1] + mixed[-1] + (mixed[:-1] * powers[:-1].flip(0)).sum()
