"""The largest values of every feature, for quantiles near the top."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.features.collecting.entries import rank_in_group, sort_by

_WAITING = 1 << 19


class Largest:
    """The `k` largest values of each of `d_sae` features; memory is bounded by `d_sae * k` values and those that wait."""

    def __init__(self, d_sae: int, k: int) -> None:
        self.d_sae, self.k = d_sae, k
        self._floor = torch.full((d_sae,), -torch.inf)
        self._batches = [(torch.zeros(0, dtype=torch.int32), torch.zeros(0))]
        self._n_waiting = 0

    def offer(self, features: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> None:
        """Values of one batch."""
        better = values > self._floor[features]
        self._batches.append((features[better].int(), values[better]))
        self._n_waiting += len(self._batches[-1][0])
        if self._n_waiting > max(_WAITING, len(self._batches[0][0]) // 4):
            self._sort()

    def merge(self, other: Largest) -> None:
        """Add what another one kept."""
        self._batches += other._batches
        self._sort()

    def nth(self, features: Int[Tensor, " n"], above: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The value of each feature that `above[i]` (below k) of its values are larger than."""
        kept, values = self._sorted()
        return values[torch.searchsorted(kept, features.int()) + above]

    def _sorted(self) -> tuple[Tensor, Tensor]:
        self._sort()
        return self._batches[0]

    def _sort(self) -> None:
        if len(self._batches) == 1:
            return
        features, values = (torch.cat(column) for column in zip(*self._batches, strict=True))
        order = sort_by(features, -values)
        place = rank_in_group(features[order])
        order, place = order[place < self.k], place[place < self.k]
        features, values = features[order], values[order]
        last = place == self.k - 1
        self._floor[features[last].long()] = values[last]
        self._batches, self._n_waiting = [(features, values)], 0

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors for a file."""
        return dict(zip(("features", "values"), self._sorted(), strict=True))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` returned."""
        self._batches.append((tensors["features"], tensors["values"]))
        self._sort()
