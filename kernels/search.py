"""Types for the candidate search: the operands of the screen, their error bound, and the pairs that it finds.

A screen (a cheap dense product, in bfloat16 where that is fast) bounds all scores from above. Pairs that reach a floor are
candidates; every other pair scores below `bound = floor + error_bound`. A selection is certified when its last kept score is
at least that bound. The backends build on this file; `candidates.py` runs them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TINY = torch.finfo(torch.bfloat16).tiny
"""Scores up to this value count as zero."""
MARGIN = 1.2
"""Candidate margin in units of the error bound: a larger margin means more candidates and fewer uncertified rows."""


class Candidates(NamedTuple):
    """Candidate pairs in CSR form, feature ids ascending within each row."""

    features: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " rows_plus_1"]
    bound: Float[Tensor, " rows"]
    """Every other pair of the row scores below this, or at most `TINY`."""

    def completes(self, kth: Float[Tensor, " rows_or_1"]) -> Bool[Tensor, " rows"]:
        """Per row, whether no pair outside the candidates can score higher than `kth`, the last score kept."""
        return self.bound <= kth.clamp_min(2 * TINY)


class Operands(NamedTuple):
    """Operands of a screen: `a @ b.T (+ bias) + error_bound` is at least the score of every pair."""

    a: Tensor
    """(rows, K)"""
    b: Tensor
    """(columns, K)"""
    bias: Tensor | None
    """(columns) or (rows, 1), added to the product; None if extra columns of `a` and `b` carry it."""
    error_bound: Float[Tensor, " rows"]
    """How far a score may exceed its entry of the product."""
    margin: Float[Tensor, " rows"]
    """Candidate margin: how far below the k-th group maximum the floor is set, so that nearly every row is certified."""
    sizes: tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]
    """A factor per row and one per column, whose product bounds the error of a pair."""

    def select_rows(self, rows: slice | Int[Tensor, " n"]) -> Operands:
        """The operands of the chosen rows."""
        bias = self.bias[rows] if self.bias is not None and self.bias.ndim == 2 else self.bias
        c, lengths = self.sizes
        return Operands(self.a[rows], self.b, bias, self.error_bound[rows], self.margin[rows], (c[rows], lengths))

    def transposed(self) -> Operands:
        """The operands with rows and columns exchanged (for values, not magnitudes)."""
        c, lengths = self.sizes
        if self.bias is not None:
            error_bound = lengths * largest_of(c)
            return Operands(self.b, self.a, self.bias[:, None], error_bound, 2 * error_bound, (lengths, c))
        return Operands(self.b, self.a, None, torch.zeros_like(lengths), MARGIN * lengths * c.mean(), (lengths, c))


def gamma(terms: int, dtype: torch.dtype) -> float:
    """`n u / (1 - n u)`: bound on the relative error of a sum of `n = terms` products, u the unit roundoff."""
    unit = torch.finfo(dtype).eps / 2
    return terms * unit / (1 - terms * unit)


def largest_of(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())
