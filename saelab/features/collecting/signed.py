"""Streaming statistics of both ends of every feature: its positive and its negative activations.

Each end has its own `Accumulator` of magnitudes; the negative one is created at the first negative value, so SAEs
without any pay nothing for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.features.collecting.accumulate import Accumulator
from saelab.features.collecting.entries import Entries, sorted_entries
from saelab.kernels.sparse_acts import SparseActs

_ENDS = {1: "positive", -1: "negative"}


class SignedAccumulator:
    """Running statistics of `d_sae` features with values of either sign; `update` adds one batch."""

    def __init__(self, d_sae: int, ctx_len: int, top_k: int) -> None:
        self._size = self.d_sae, self.ctx_len, self.top_k = d_sae, ctx_len, top_k
        self.positive = Accumulator(*self._size)
        self.negative: Accumulator | None = None

    def update(self, feature_acts: SparseActs, tokens: Int[Tensor, " batch"], docs: Int[Tensor, " batch"]) -> Entries:
        """Count one batch (see `sorted_entries`), and return its entries."""
        entries = sorted_entries(feature_acts, tokens, docs)
        below = entries.values < 0
        if self.negative is None and bool(below.any()):
            self.negative = Accumulator(*self._size)
        if self.negative is None:
            self.positive.add(entries, entries)
            return entries
        self.positive.add(entries.take(~below), entries)
        magnitudes = entries.take(below)
        self.negative.add(magnitudes._replace(values=-magnitudes.values), entries)
        return entries

    def merge(self, other: SignedAccumulator) -> None:
        """Add the statistics of other tokens."""
        self.positive.merge(other.positive)
        if other.negative is not None:
            self.negative = self.negative or Accumulator(*self._size)
            self.negative.merge(other.negative)

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors for a file."""
        return {f"{_ENDS[sign]}.{name}": one for sign, end in self.ends.items() for name, one in end.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` returned."""
        for sign, name in _ENDS.items():
            stored = {key.removeprefix(f"{name}."): one for key, one in tensors.items() if key.startswith(f"{name}.")}
            if stored and sign < 0:
                self.negative = Accumulator(*self._size)
            if stored:
                self.ends[sign].load(stored)

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
