"""`State`: everything that changes during a run, saved to its folder and restored from it, by one or several processes."""

from __future__ import annotations

from pathlib import Path

import torch

from saelab.distributed.mesh import Mesh
from saelab.saes import SAE
from saelab.training.adam import Adam
from saelab.training.checkpoint import (
    check_checkpoint,
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    note_latest,
    save_checkpoint,
    state_of,
)
from saelab.training.dead_features import DeadFeatures
from saelab.training.feature_shards import FeatureShard
from saelab.training.running_norm import RunningNorm
from saelab.training.sharded_checkpoint import load_shard, row_names, save_shard


class State:
    """Weights, Adam's moments and the counters of one run. All ranks call each method, with the same `folder` or none."""

    def __init__(
        self,
        folder: Path | None,
        keep: int,
        sae: SAE,
        adam: Adam,
        dead: DeadFeatures,
        mesh: Mesh,
        running: RunningNorm | None = None,
    ) -> None:
        self.folder, self.keep, self.mesh = folder, keep, mesh
        self._modules = sae, adam, dead, running
        self._tensors = state_of(*self._modules)
        self._rows = row_names(sae) if isinstance(sae, FeatureShard) else None
        self._device = dead.tokens_since_fired.device

    def save(self, step: int) -> None:
        """Write the state before `step`; the newest `keep` stay. With sharded features all ranks write."""
        first = self.mesh.world.is_main_process
        if self.folder is None or not step:
            return
        if self._rows is not None:
            path = checkpoint_path(self.folder, step).with_suffix("")
            save_shard(path, step, self._tensors, self._rows, self.mesh)
            if first:
                note_latest(self.folder, step, self.keep)
        elif first:
            save_checkpoint(self.folder, step, self.keep, state_of(*self._modules))

    def load(self, n_steps: int) -> int:
        """Restore the newest intact checkpoint, of any number of ranks and shards; returns the step to resume at."""
        found = 0
        if self.folder is not None and self.mesh.world.is_main_process:
            if self._rows is None:
                found = load_checkpoint(self.folder, n_steps, state_of(*self._modules))
            else:
                check = lambda path, step: check_checkpoint(path, step, n_steps)  # noqa: E731
                found = newest_checkpoint(self.folder, check)
        step = torch.tensor(found, device=self._device)
        self.mesh.world.broadcast_([step])
        if self._rows is None:
            self.mesh.world.broadcast_(self._tensors.values())
        elif self.folder is not None and int(step):
            load_shard(checkpoint_path(self.folder, int(step)), self._tensors, self._rows, self.mesh)
        return int(step)
