"""One SAE in training: its optimiser, its dead-feature counters, its log, its folder."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.distributed import Ranks
from saelab.distributed.mesh import Mesh
from saelab.errors import TrainingError
from saelab.io import load_sae, save_sae
from saelab.saes import SAE, VARIANTS
from saelab.saes.config import settings
from saelab.saes.provenance import Provenance
from saelab.saes.step import RULES
from saelab.training.adam import EPS, Adam, default_eps
from saelab.training.checkpoint import State, claim_run, list_checkpoints
from saelab.training.config import TrainConfig
from saelab.training.control import whiten_by_control
from saelab.training.data_source import DataSource, Rows, View
from saelab.training.dead_features import DeadFeatures, dead_window
from saelab.training.environment import environment, warn_if_elsewhere
from saelab.training.feature_shards import FeatureShard, check_shardable, gather_into, shard_of
from saelab.training.metrics_log import MetricsLog
from saelab.training.optimizer import learning_rate
from saelab.training.running_norm import RunningNorm
from saelab.training.snapshots import has_snapshot, is_due, save_snapshot
from saelab.training.start import check_end, check_promise, check_start
from saelab.training.steps import Found, Step, Trained, make_step


def variant_of(config: Any) -> type[SAE]:
    """The SAE class of a config. Raises `ValueError` for anything that is not one."""
    for cls in VARIANTS.values():
        if type(config) is cls.Config:
            return cls
    known = ", ".join(cls.Config.__name__ for cls in VARIANTS.values())
    raise ValueError(f"{config!r} is not an SAE config; pass one of {known} (saelab.saes).")


class Run:
    """Call `train_step(rows)` once per step, and `finish(rows, unseen, kept_out)` when `step` reaches `train.n_steps`.

    On a mesh each rank has a `Run` with its rows of every batch and its features; only rank 0 writes.
    """

    def __init__(
        self,
        config: Any,
        source: DataSource,
        train: TrainConfig,
        folder: Path | None,
        wandb_project: str | None,
        mesh: Mesh | None = None,
        rules: int = RULES,
    ) -> None:
        self.mesh, self.rules = mesh or Mesh(), rules
        self.ranks = self.mesh.world
        self.train, self.folder = train, folder if self.ranks.is_main_process else None
        self.device = device_of(train)
        _check_shares(variant := variant_of(config), config, train, self.mesh.data)
        view = source.view(variant, config)
        self.hooks = view.hooks
        self.sae = variant(config, view.d_in, seed=train.seed, **view.shape)
        self._place(view.moments, source)
        self._make_step = source.make_step or make_step
        self.sae.provenance, self._documents = Provenance(origin=view.origin), source.documents
        self._unsharded: SAE | None = None
        if train.feature_shards > 1:
            self._unsharded = self.sae if self.ranks.is_main_process else None
            self.sae = shard_of(self.sae, self.mesh)
        self.sae.to(self.device)
        eps = EPS if rules < 2 else default_eps(train.batch_size, view.width_out)
        eps = eps if train.eps is None else train.eps
        self.adam = Adam(self.sae.parameters(), self.sae.weight_decay, train.betas, eps)
        self.running = None if train.clip_relative is None else RunningNorm(train.clip_relative, self.device)
        self.dead = DeadFeatures(self.sae.d_sae, dead_window(train, variant, config, rules), self.device)
        self.state = State(folder, train.keep_checkpoints, self.sae, self.adam, self.dead, self.mesh, self.running)
        self.step = 0
        self.last: dict[str, Any] = {}
        self._spent, self._spent_on = 0.0, 0
        self._continue(config, view)
        self.finished = self.step == train.n_steps
        self._begin(wandb_project if self.ranks.is_main_process else None)

    def _begin(self, wandb_project: str | None) -> None:
        """Set up the step and the log of a run that is not finished."""
        self._unsettled: dict[int, Rows] = {}
        """The rows of the steps whose metrics are not known yet."""
        self._step: Step | None = None
        self.log: MetricsLog | None = None
        if not self.finished:
            trained = Trained(
                sae=self.sae,
                adam=self.adam,
                dead=self.dead,
                hooks=self.hooks,
                train=self.train,
                mesh=self.mesh,
                running=self.running,
                device=self.device,
                rules=self.rules,
            )
            self._step = self._make_step(trained)
            self.log = MetricsLog(self.folder, self.step, wandb_project)

    def _place(self, moments: tuple[torch.Tensor, ...], source: DataSource) -> None:
        """Fit the normalisation, and the initial biases and thresholds, to the data; or take all from `source.start`."""
        self.sae.set_normalization(*moments)
        if self.rules >= 2:
            self.sae.start_from(*moments)
        whiten_by_control(self.sae, source)
        if source.start is not None:
            self.sae.load_state_dict(source.start.state_dict())

    def _continue(self, config: Any, view: View) -> None:
        """Resume from what the folder holds; a finished run is loaded, at its last step."""
        here = environment(self.device, self.mesh)
        begun = here
        if self.folder is not None:
            begun = claim_run(self.folder, self._identity(config, view), self.rules, here)
        ended = self.folder is not None and (self.folder / "sae.json").exists()
        if self.ranks.any_rank(ended, self.device):
            self.step = self.train.n_steps
            self.sae = self.sae if self.folder is None else load_sae(self.folder, self.device)
            if self.train.feature_shards == 1:
                self.ranks.broadcast_(self.sae.state_dict().values())
            return
        self.step = self.state.load(self.train.n_steps)
        if self.step:
            warn_if_elsewhere(begun, here)

    def _identity(self, config: Any, view: View) -> dict[str, Any]:
        """What must be unchanged for a run to be resumed; the number of ranks may change."""
        named = {"variant": self.sae.variant, "config": settings(config), "train": self.train.settings()}
        named |= {"rows": view.rows} if view.rows else {}
        return named | {"data": view.fingerprint, "d_in": self.sae.d_in, **self.sae.shape}

    def train_step(self, rows: Rows) -> None:
        """One optimiser step. Raises `TrainingError` on NaN or infinite rows, loss or gradient (of this step, or on a GPU of one
        a few steps earlier), and if all rows are the same; the last checkpoint is left intact."""
        start = time.perf_counter()
        if any(_are_the_same(rows[name]) for name in self.hooks.all):
            raise TrainingError(self._explain(self.step, rows))
        self._unsettled[self.step] = rows
        assert self._step is not None
        found = self._step(rows, self.step, self._lr(self.step), self._is_logged(self.step))
        self.step += 1
        self._spent, self._spent_on = self._spent + time.perf_counter() - start, self._spent_on + 1
        self._note(found)
        if is_due(self.train.snapshot_every, self.step, self.train.n_steps):
            self._snapshot(rows)
        if (
            self.train.checkpoint_every
            and self.step % self.train.checkpoint_every == 0 < self.train.n_steps - self.step
        ):
            self.checkpoint()

    def _is_logged(self, step: int) -> bool:
        return step % self.train.log_every == 0 or step == self.train.n_steps - 1

    def _lr(self, step: int) -> float:
        return learning_rate(self.train, self.sae.base_lr, self.sae.d_sae * self.mesh.feature.size, step)

    def _note(self, found: Found) -> None:
        """Check and log the metrics of steps, in order."""
        for step, values in found:
            rows = self._unsettled.pop(step)
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise TrainingError(self._explain(step, rows))
            if step == 0 and self.rules >= 2:
                check_start(self.sae, values["l0"])
            if self._is_logged(step):
                self._write_log(step, values)

    def _settle(self) -> None:
        """Wait for the metrics of all steps made."""
        if self._step is not None:
            self._note(self._step.settle(self.step))

    def checkpoint(self) -> None:
        """Write the state before the next step, if the run has a folder and has made a step."""
        self._settle()
        self.state.save(self.step)

    def finish(self, rows: Rows, unseen: Rows, kept_out: bool) -> SAE:
        """Calibrate the trained SAE on the `unseen` rows (`kept_out`: whether they were held out of training), and save it
        with golden inputs taken from `rows`. With sharded features rank 0 gets the whole SAE."""
        self._settle()
        self.sae = self._full_sae()
        if self.log is not None:
            self.log.close()
        if self.rules >= 2:
            self.sae.fold_decoder_norms()
        check_end(self.sae, self.last.get("l0", 1.0))
        inputs = self.hooks.batch(unseen).x
        calibrated = self.rules > 1 and not isinstance(self.sae, FeatureShard) and self.sae.calibrate(inputs)
        if self.rules > 1 and not isinstance(self.sae, FeatureShard) and self.ranks.is_main_process:
            check_promise(self.sae, inputs)
        calibration = {"n_rows": len(inputs), "kept_out": kept_out} if calibrated else None
        self.sae.provenance = self._provenance(self.last, calibration)
        self.sae.eval()
        if self.folder is not None:
            save_sae(self.sae, self.folder, golden_inputs=self.hooks.batch(rows).x)
        self.finished = True
        return self.sae

    def _full_sae(self) -> SAE:
        """The SAE; with sharded features its shards put together on rank 0, on the other ranks their shard."""
        if not isinstance(self.sae, FeatureShard):
            return self.sae
        if self.mesh.data.is_main_process:
            gather_into(self._unsharded, self.sae)
        return self._unsharded or self.sae

    def _provenance(self, metrics: dict[str, Any] | None, calibration: dict[str, Any] | None) -> Provenance:
        """Where the SAE comes from as it now is."""
        trained = {
            "train": self.train.settings(),
            "rules": self.rules,
            "n_tokens": self.step * self.train.batch_size,
            "metrics": metrics,
            "calibration": calibration,
        } | environment(self.device, self.mesh)
        return Provenance(self.sae.provenance.origin, trained, self._documents())

    def _snapshot(self, rows: Rows) -> None:
        """Keep the SAE as it is before the next step, unless the run had come so far before it was interrupted."""
        self._settle()
        missing = self.folder is not None and not has_snapshot(self.folder, self.step)
        if not self.ranks.any_rank(missing, self.device):
            return
        sae = self._full_sae()
        if self.folder is not None:
            provenance, x = self._provenance(None, None), self.hooks.batch(rows).x
            save_snapshot(self.folder, self.step, sae, provenance, x, fold=self.rules >= 2)

    def _write_log(self, step: int, values: dict[str, Any]) -> None:
        # Counts this SAE's steps only: others may share the data.
        rate = self._spent_on * self.train.batch_size / max(self._spent, 1e-9)
        self._spent, self._spent_on = 0.0, 0
        tokens = (step + 1) * self.train.batch_size
        self.last = {"step": step, "tokens": tokens, **values, "lr": self._lr(step)}
        if self.log is not None:
            self.log.write(self.last | {"tokens_per_second": round(rate, 1)})

    def _explain(self, step: int, rows: Rows) -> str:
        cause = f"the loss of batch {step} is not finite though its activations are; lower lr"
        for name in self.hooks.columns:
            x = rows[name].flatten(1)
            bad = (~x.isfinite().all(1)).nonzero().flatten().tolist()
            if bad:
                cause = f"{len(bad)} of {len(x)} activations in batch {step} are NaN or infinite"
                cause += f" ({name!r}, the first is row {bad[0]}); harvest them again"
                break
            if _are_the_same(x):
                cause = f"all activations {name!r} in batch {step} are the same; shuffle the rows"
        saved = list_checkpoints(self.folder) if self.folder is not None else []
        kept = f"the checkpoint of step {saved[-1]} in {self.folder} is intact" if saved else "nothing was saved yet"
        return f"Training stopped at step {step}: {cause}; {kept}."


def _are_the_same(x: Tensor) -> bool:
    """Whether all rows of a batch are the same; usually the first and last row already differ."""
    return len(x) > 1 and torch.equal(x[0], x[-1]) and bool((x == x[0]).all())


def _check_shares(variant: type[SAE], config: Any, train: TrainConfig, ranks: Ranks) -> None:
    """Raises `ValueError` if features or batches cannot be split over these ranks."""
    if train.feature_shards > 1:
        check_shardable(variant, config, train.feature_shards)
    if ranks.size == 1:
        return
    if not variant.supports_data_parallel:
        raise ValueError(
            f"{variant.variant} trains in a single process; this job has {ranks.size}: start it without torchrun."
        )
    smallest = min(len(micro_batch) for micro_batch in train.micro_batches)
    if smallest < ranks.size:
        raise ValueError(
            f"batch_size={train.batch_size} with grad_accumulation={train.grad_accumulation} has a micro-batch of {smallest} "
            f"rows, fewer than the {ranks.size} processes that share it: raise batch_size, or start fewer processes."
        )


def device_of(train: TrainConfig) -> torch.device:
    """The device of a run. Raises `ValueError` for a device that is unknown or unavailable."""
    name = train.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device={name!r} cannot be used here ({reason}): use 'cpu', or None for what is available."
        ) from error
