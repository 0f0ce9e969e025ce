"""The sums over ranks in every training step: gradients and metrics."""

from __future__ import annotations

import torch

from saelab.distributed.collectives import GradientSum
from saelab.distributed.mesh import Mesh
from saelab.saes import SAE
from saelab.training.feature_shards import ROWS


class Exchange:
    """Gradients of feature rows are summed over the ranks that hold the same features, all others over all ranks."""

    def __init__(self, sae: SAE, mesh: Mesh) -> None:
        self.mesh = mesh
        rows = [p for name, p in sae.named_parameters() if name in ROWS]
        others = [p for name, p in sae.named_parameters() if name not in ROWS]
        sharded = mesh.feature.size > 1
        self._sums = [GradientSum(rows, mesh.data), GradientSum(others, mesh.world)] if sharded else []
        self._sums = self._sums or [GradientSum([*rows, *others], mesh.world)]

    def sum_gradients(self) -> None:
        """Each parameter's gradient becomes that of the whole batch."""
        for gradient_sum in self._sums:
            gradient_sum()

    def sum_metrics(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        """Sum over rows, and for L0 over features too: of the other metrics, every shard already has the full value."""
        if self.mesh.world.size == 1:
            return values
        copies = self.mesh.feature.size
        local = [value if name == "l0" else value / copies for name, value in values.items()]
        totals = self.mesh.world.all_reduce_sum(torch.tensor(local, dtype=torch.float64, device=device))
        return dict(zip(values, totals.tolist(), strict=True))
