"""Exact selection of the largest (token, feature) pairs when the pairs are spread over ranks.

The n-th largest score is found by radix selection: each round sums the ranks' histograms of the next 11 bits (16 KB), three
rounds for float32. Positive floats sort like their bit patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.distributed.collectives import Ranks
from saelab.kernels.ragged import flatnonzero, keep_largest, stable_argsort
from saelab.kernels.sparse_acts import SparseActs, offsets_of

_DIGIT = 11
_BITS = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}


class Nth(NamedTuple):
    """What `nth_largest` found."""

    value: Float[Tensor, " 1"]
    """0 where fewer than n scores are positive."""
    n_ties: int
    """How many of the scores that equal `value` belong to the n largest."""
    all_ties: bool
    """Whether all scores that equal `value` do."""


def nth_largest(scores: Float[Tensor, " m"], n: int, ranks: Ranks) -> Nth:
    """The n-th largest of the positive scores of all ranks (n at least 1)."""
    kind, n_bits = _BITS[scores.dtype]
    bits = scores[scores > 0].view(kind)
    key, left, n_ties = 0, n, 0
    for shift in range(n_bits // _DIGIT * _DIGIT, -1, -_DIGIT):
        digits = (bits >> shift) & ((1 << _DIGIT) - 1)
        above = (
            ranks.all_reduce_sum(torch.bincount(digits, minlength=1 << _DIGIT)).flip(0).cumsum(0)
        )  # counts from the largest digit down
        at = int(torch.searchsorted(above, left))
        if at == len(above):  # only in the first round
            return Nth(scores.new_zeros(1), 0, True)
        before = int(above[at - 1]) if at else 0
        left, n_ties = left - before, int(above[at]) - before
        digit = len(above) - 1 - at
        key, bits = key | (digit << shift), bits[digits == digit]
    return Nth(torch.tensor([key], dtype=kind, device=scores.device).view(scores.dtype), left, left == n_ties)


@dataclass(frozen=True)
class GlobalPairs:
    """The pairs of all ranks; this rank's rows start at `first_row` and its features at `first_feature`."""

    ranks: Ranks
    d_sae: int
    """Features on all ranks together."""
    first_row: int
    first_feature: int = 0

    @property
    def size(self) -> int:
        """Number of ranks that hold pairs."""
        return self.ranks.size

    def all_reduce_min(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Elementwise minimum over the ranks."""
        return self.ranks.all_reduce_min(x)

    def every(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on all ranks."""
        return not self.ranks.any_rank(not flag, device)

    def keep(
        self, scores: Float[Tensor, " m"], rows: Int[Tensor, " m"], features: Int[Tensor, " m"], n: int
    ) -> tuple[Int[Tensor, " kept"], Float[Tensor, " 1"]]:
        """Positions, ascending, of this rank's scores among the `n` largest positive ones of all ranks, and the n-th largest
        score (0 if fewer are positive). Ties for the last place go to the earlier row, then the lower feature.
        """
        nth = nth_largest(scores, n, self.ranks)
        if nth.all_ties:
            return flatnonzero((scores >= nth.value) & (scores > 0)), nth.value
        tied = flatnonzero(scores == nth.value)
        positions = (rows[tied] + self.first_row) * self.d_sae + features[tied] + self.first_feature  # ascending
        last = torch.cat(self.ranks.all_gather(positions[: nth.n_ties])).sort().values[nth.n_ties - 1]
        kept = scores > nth.value
        kept[tied[positions <= last]] = True
        return flatnonzero(kept), nth.value


def keep_by_feature(feature_acts: SparseActs, capacity: Int[Tensor, " d_sae"], ranks: Ranks) -> Bool[Tensor, " nnz"]:
    """Which activations are among the `capacity[i]` largest of their feature i on all ranks.

    Ties go to the earlier row. `feature_acts` must hold at least those on this rank's rows. If every rank has its share of a
    feature's capacity at or above some floor, the smallest value kept is not below it, so only activations that reach the
    floor are communicated.
    """
    order, _, offsets = feature_acts.by_feature
    scores, features = feature_acts.values.detach()[order], feature_acts.features[order]
    _, last = keep_largest(scores, offsets, -(-capacity // ranks.size))  # 0 if there are fewer
    sent = flatnonzero(scores >= ranks.all_reduce_min(last)[features])
    gathered = ranks.all_gather(scores[sent])
    all_scores, all_features = torch.cat(gathered), torch.cat(ranks.all_gather(features[sent]))
    by_feature = stable_argsort(all_features)  # within a feature by rank, then by row
    counts = torch.bincount(all_features, minlength=feature_acts.d_sae)
    kept, _ = keep_largest(all_scores[by_feature], offsets_of(counts), capacity)
    chosen = torch.zeros(len(all_scores), dtype=torch.bool, device=order.device)
    chosen[by_feature[kept]] = True
    mask = torch.zeros(feature_acts.nnz, dtype=torch.bool, device=order.device)
    mask[order[sent]] = chosen.split([len(one) for one in gathered])[ranks.rank]
    return mask
