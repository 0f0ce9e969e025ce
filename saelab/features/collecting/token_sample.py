"""Every feature that fires on each token of a sample, for exact co-activation counts between any two features.

The sample holds the tokens whose hash ends in enough zero bits, so it is uniform, the same in every SAE of the same tokens, and
independent of the order and of the processes in which they come.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelab.features.collecting.entries import token_hash
from saelab.kernels.sparse_acts import SparseActs

MAX_TOKENS = 1 << 17
_MOST_BATCHES = 32
"""Batches that are kept apart: many small blocks between the large ones of a pass keep its freed memory from being used again."""


class TokenSample:
    """At most `MAX_TOKENS` tokens with their features; `level` zero bits choose one token in `2 ** level`."""

    def __init__(self) -> None:
        self.level = 0
        none = torch.zeros(0, dtype=torch.int64)
        self._batches = [(none, none, none.int())]
        self._n_tokens = 0

    def update(self, feature_acts: SparseActs, tokens: Int[Tensor, " batch"]) -> None:
        """Add one batch; `tokens` numbers its rows."""
        here = self._belongs(tokens)
        rows = feature_acts.select_rows(here)
        self._append(tokens[here], rows.counts, rows.features.int())

    def merge(self, other: TokenSample) -> None:
        """Add the sample of other tokens."""
        self.level = max(self.level, other.level)
        batches, self._batches, self._n_tokens = self._batches + other._batches, [], 0
        for tokens, counts, features in batches:
            self._append(*self._thinned(tokens, counts, features))

    def csr(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n_plus_1"], Int[Tensor, " nnz"]]:
        """Token numbers (ascending), offsets, and the ids of the features that fire on each token (ascending)."""
        tokens, counts, features = self._joined()
        order = torch.argsort(tokens, stable=True)
        starts = counts.cumsum(0) - counts
        inside = torch.repeat_interleave(starts[order] - (counts[order].cumsum(0) - counts[order]), counts[order])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts[order].cumsum(0)])
        return tokens[order], offsets, features[inside + torch.arange(len(inside))]

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors for a file."""
        return dict(zip(("tokens", "offsets", "features"), self.csr(), strict=True)) | {
            "level": torch.tensor(self.level)
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` returned."""
        self.level = int(tensors["level"])
        self._append(tensors["tokens"], tensors["offsets"].diff(), tensors["features"])

    def _append(self, tokens: Tensor, counts: Tensor, features: Tensor) -> None:
        self._batches.append((tokens, counts, features))
        self._n_tokens += len(tokens)
        while self._n_tokens > MAX_TOKENS:
            self.level += 1
            self._batches = [self._thinned(*batch) for batch in self._batches]
            self._n_tokens = sum(len(batch[0]) for batch in self._batches)
        if len(self._batches) > _MOST_BATCHES:
            self._batches = [self._joined()]

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        tokens, counts, features = (torch.cat(column) for column in zip(*self._batches, strict=True))
        return tokens, counts, features

    def _thinned(self, tokens: Tensor, counts: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = self._belongs(tokens)
        return tokens[here], counts[here], features[torch.repeat_interleave(here, counts)]

    def _belongs(self, tokens: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        return token_hash(tokens) & ((1 << self.level) - 1) == 0
