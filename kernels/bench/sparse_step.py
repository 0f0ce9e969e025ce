"""`SparseTopK`: the training step that the benchmarks time."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.saes import TopKConfig, TopKSAE
from saelab.saes.step import Batch, StepInfo
from saelab.training.adam import Adam
from saelab.training.dead_features import DeadFeatures
from saelab.training.optimizer import apply_step


class SparseTopK:
    """The training step of `saelab.train`, without its data and files."""

    def __init__(self, d_in: int, d_sae: int, k: int, device: str = "cpu") -> None:
        self.sae = TopKSAE(TopKConfig(d_sae=d_sae, k=k), d_in).to(device)
        self.adam, self.dead = Adam(self.sae.parameters()), DeadFeatures(d_sae, 10**9, torch.device(device))

    def step(self, x: Tensor) -> dict[str, float]:
        loss = self.sae.loss(Batch(x, x), StepInfo(self.dead.dead, 0, 1))
        loss.total.backward()
        self.dead.update(loss.feature_acts)
        norm = apply_step(self.sae, self.adam, 2e-3, 1.0)
        l0, dead = loss.feature_acts.nnz / len(x), float(self.dead.dead.float().mean())
        return {"loss": loss.total.item(), "l0": l0, "grad_norm": norm, "dead": dead}
