"""What a search for candidates is about: the operands of a cheap product, the bound of its error, and the pairs it leaves.

A screen (a cheap dense product, in bfloat16 where that is fast) bounds all scores from above. Pairs that reach a floor are
candidates; every other pair lies under `bound = floor + error_bound`. A selection is certified when its last member is not
under that bound. Backends build on this file; `candidates.py` runs them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TINY = torch.finfo(torch.bfloat16).tiny
"""Scores up to here count as zero."""
MARGIN = 1.2
"""How far under the k-th group maximum a floor is set, in error bounds: wider means more candidates and fewer rows that are
searched again."""


class Candidates(NamedTuple):
    """CSR pairs, ids ascending in each row."""

    features: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " rows_plus_1"]
    bound: Float[Tensor, " rows"]
    """Every other pair of the row scores less than this, or no more than `TINY`."""

    def completes(self, kth: Float[Tensor, " rows_or_1"]) -> Bool[Tensor, " rows"]:
        """Whether no pair outside the candidates can have a better score than the last one kept."""
        return self.bound <= kth.clamp_min(2 * TINY)


class Operands(NamedTuple):
    """What a screen multiplies. `a @ b.T (+ bias)`, plus `error_bound`, is at least the score, for every pair."""

    a: Tensor
    """(rows, K)"""
    b: Tensor
    """(columns, K)"""
    bias: Tensor | None
    """(columns) or (rows, 1) added to the product; None where columns of `a` and `b` carry it."""
    error_bound: Float[Tensor, " rows"]
    """By how much a score may exceed its entry of the product."""
    margin: Float[Tensor, " rows"]
    """How far under the k-th group maximum a floor is set: wide enough that nearly every row is certified."""
    sizes: tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]
    """Two factors whose product bounds the error of a pair."""

    def select_rows(self, rows: slice | Int[Tensor, " n"]) -> Operands:
        """The same for some rows."""
        bias = self.bias[rows] if self.bias is not None and self.bias.ndim == 2 else self.bias
        c, lengths = self.sizes
        return Operands(self.a[rows], self.b, bias, self.error_bound[rows], self.margin[rows], (c[rows], lengths))

    def transposed(self) -> Operands:
        """The same with rows and columns exchanged (values, not magnitudes)."""
        c, lengths = self.sizes
        if self.bias is not None:
            error_bound = lengths * largest_of(c)
            return Operands(self.b, self.a, self.bias[:, None], error_bound, 2 * error_bound, (lengths, c))
        return Operands(self.b, self.a, None, torch.zeros_like(lengths), MARGIN * lengths * c.mean(), (lengths, c))


def gamma(terms: int, dtype: torch.dtype) -> float:
    """`n u / (1 - n u)`: relative error of a sum of `terms` products."""
    unit = torch.finfo(dtype).eps / 2
    return terms * unit / (1 - terms * unit)


def largest_of(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())
