"""`SparseTopK`: the training step that the benchmarks time."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.distributed.mesh import Mesh
from saelab.saes import TopKConfig, TopKSAE
from saelab.saes.hooks_used import HooksUsed
from saelab.saes.step import RULES
from saelab.training.adam import Adam
from saelab.training.config import TrainConfig
from saelab.training.dead_features import DeadFeatures
from saelab.training.steps import FusedTraining, Step, Trained, make_step

_HOOK = "x"


class SparseTopK:
    """The training step of `saelab.train`, without its data and files."""

    def __init__(self, d_in: int, d_sae: int, k: int, device: str = "cpu") -> None:
        self.sae = TopKSAE(TopKConfig(d_sae=d_sae, k=k), d_in).to(device)
        self._adam, self._device = Adam(self.sae.parameters()), torch.device(device)
        self._dead = DeadFeatures(d_sae, 10**9, self._device)
        self._step: Step | None = None
        self._at = 0

    def step(self, x: Tensor) -> dict[str, float]:
        """One step; its metrics, or on a GPU those of a step some steps earlier, if there was one."""
        if self._step is None:
            train = TrainConfig(n_tokens=len(x) << 20, batch_size=len(x), log_every=1)
            hooks = HooksUsed((_HOOK,), (_HOOK,))
            of = Trained(self.sae, self._adam, self._dead, hooks, train, Mesh(), None, self._device, RULES)
            self._step = make_step(of)
        found = self._step({_HOOK: x}, self._at, 2e-3, logged=False)
        self._at += 1
        if isinstance(self._step, FusedTraining):
            return found[-1][1] if found else {}
        return found[-1][1] | {"dead": float(self._dead.dead.float().mean())}

    def selection(self) -> dict[str, float]:
        """What the last selection of the fused step did, as the columns of a row; empty for another step."""
        return self._step.selection() if isinstance(self._step, FusedTraining) else {}
