"""Streaming statistics of both ends of every feature: its positive and its negative activations.

Each end has its own `Accumulator` of magnitudes; the negative one is created at the first negative value, so SAEs
without any pay nothing for it.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.features.accumulate import Accumulator, sorted_entries
from saelab.kernels.sparse_acts import SparseActs


class SignedAccumulator:
    """Running statistics of `d_sae` features with values of either sign; `update` adds one batch."""

    def __init__(self, d_sae: int, ctx_len: int, top_k: int) -> None:
        self._size = self.d_sae, self.ctx_len, self.top_k = d_sae, ctx_len, top_k
        self.positive = Accumulator(*self._size)
        self.negative: Accumulator | None = None

    def update(self, feature_acts: SparseActs, tokens: Int[Tensor, " batch"], docs: Int[Tensor, " batch"]) -> None:
        """Count one batch (see `sorted_entries`)."""
        entries = sorted_entries(feature_acts, tokens, docs)
        below = entries.values < 0
        if self.negative is None and bool(below.any()):
            self.negative = Accumulator(*self._size)
        if self.negative is None:
            self.positive.add(entries, entries)
            return
        self.positive.add(entries.take(~below), entries)
        magnitudes = entries.take(below)
        self.negative.add(magnitudes._replace(values=-magnitudes.values), entries)

    @property
    def ends(self) -> dict[int, Accumulator]:
        """The accumulators by sign, 1 and -1."""
        return {1: self.positive} | ({} if self.negative is None else {-1: self.negative})

    @property
    def n_fired(self) -> Int[Tensor, " d_sae"]:
        """Number of tokens with a non-zero value, per feature."""
        return torch.stack([end.n_fired for end in self.ends.values()]).sum(0)

    @property
    def sign(self) -> Int[Tensor, " d_sae"]:
        """1 or -1 per feature: the end at which it fires more often; ties go to the greater sum of magnitudes."""
        if self.negative is None:
            return torch.ones(self.d_sae, dtype=torch.int64)
        up, down = self.positive, self.negative
        below = (down.n_fired > up.n_fired) | ((down.n_fired == up.n_fired) & (down.total > up.total))
        return torch.where(below, -1, 1)
