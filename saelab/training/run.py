"""One SAE in training: its optimiser, its dead-feature counters, its log, its folder."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from saelab.errors import TrainingError
from saelab.io import load_sae, save_sae
from saelab.losses import sum_of_squares, total_variance
from saelab.saes import SAE, VARIANTS, Batch, StepInfo
from saelab.training.adam import Adam
from saelab.training.checkpoint import claim_run, list_checkpoints, load_checkpoint, save_checkpoint
from saelab.training.config import TrainConfig
from saelab.training.data import DataSource, Rows
from saelab.training.dead_features import DeadFeatures
from saelab.training.metrics_log import MetricsLog
from saelab.training.optimizer import apply_step, learning_rate


def variant_of(config: Any) -> type[SAE]:
    """The SAE class of a config. Raises `ValueError` for anything that is not one."""
    for cls in VARIANTS.values():
        if type(config) is cls.Config:
            return cls
    known = ", ".join(cls.Config.__name__ for cls in VARIANTS.values())
    raise ValueError(f"{config!r} is not an SAE config; give one of {known} (saelab.saes).")


class Run:
    """Call `train_on(batch)` once a step; `finish(batch)` when `step` reaches `config.n_steps`."""

    def __init__(
        self, config: Any, source: DataSource, train: TrainConfig, folder: Path | None, wandb_project: str | None
    ) -> None:
        self.train, self.folder = train, folder
        self.device = device_of(train)
        variant = variant_of(config)
        view = source.view(variant, config)
        self.sites = view.sites
        self.sae = variant(config, view.d_in, seed=train.seed, **view.shape)
        self.sae.set_normalization(*view.moments)
        self.sae.origin, self._documents = view.origin, source.documents
        self.sae.to(self.device)
        self.adam = Adam(self.sae.parameters(), self.sae.weight_decay)
        self.dead = DeadFeatures(self.sae.d_sae, train.dead_window, self.device)
        self.step = 0
        self.last: dict[str, Any] = {}
        self._spent, self._spent_on = 0.0, 0
        self.finished = self._continue(config, view.fingerprint)
        self.log = MetricsLog(folder, self.step, wandb_project) if not self.finished else None

    def _continue(self, config: Any, fingerprint: str) -> bool:
        """Take up what the folder holds; True when the run had already ended."""
        if self.folder is None:
            return False
        begun = claim_run(
            self.folder,
            {"variant": self.sae.variant, "config": dataclasses.asdict(config), "train": self.train.settings()}
            | {"data": fingerprint, "d_in": self.sae.d_in, **self.sae.shape},
            environment(self.device),
        )
        if (self.folder / "sae.json").exists():
            self.sae = load_sae(self.folder)
            self.step = self.train.n_steps
            return True
        self.step = load_checkpoint(self.folder, self.train.n_steps, self.sae, self.adam, self.dead)
        if self.step:
            _warn_if_elsewhere(begun, environment(self.device))
        return False

    def train_on(self, rows: Rows) -> None:
        """One optimiser step. Raises `TrainingError` on NaN or infinite rows, loss or gradient; the last checkpoint stays."""
        start = time.perf_counter()
        batch = self.sites.batch({name: rows[name].to(self.device) for name in self.sites.all})
        info = StepInfo(self.dead.dead, self.step, self.train.n_steps)
        logged = self.step % self.train.log_every == 0 or self.step == self.train.n_steps - 1
        sums: dict[str, Any] = {}
        for part in _chunks(batch, self.train.grad_accumulation):
            share = len(part.x) / len(batch.x)
            loss = self.sae.loss(part, info)
            (loss.total * share).backward()
            self.dead.update(loss.acts)
            values = {"loss": loss.total.item(), "l0": loss.acts.nnz / len(part.x)}
            if logged:
                values |= {name: term.item() for name, term in loss.terms.items()}
                values["fvu"] = float(sum_of_squares(loss.residual) / total_variance(loss.y))
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + share * value
        lr = learning_rate(self.train, self.sae.base_lr, self.sae.d_sae, self.step)
        sums["grad_norm"] = apply_step(self.sae, self.adam, lr, self.train.clip_norm)
        if not (math.isfinite(sums["loss"]) and math.isfinite(sums["grad_norm"])):
            raise TrainingError(self._explain(batch))
        self.step += 1
        self._spent, self._spent_on = self._spent + time.perf_counter() - start, self._spent_on + 1
        if logged:
            self._write_log(sums, lr)
        if (
            self.train.checkpoint_every
            and self.step % self.train.checkpoint_every == 0 < self.train.n_steps - self.step
        ):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write the state before the next step, where the run has a folder and has begun."""
        if self.folder is not None and self.step:
            save_checkpoint(self.folder, self.step, self.train.keep_checkpoints, self.sae, self.adam, self.dead)

    def finish(self, rows: Rows) -> SAE:
        """Save the trained SAE with golden inputs taken from `rows`."""
        if self.log is not None:
            self.log.close()
        self.sae.trained = {
            "train": self.train.settings(),
            "n_tokens": self.train.n_steps * self.train.batch_size,
            "metrics": self.last,
        } | environment(self.device)
        self.sae.train_documents = self._documents()
        self.sae.eval()
        if self.folder is not None:
            save_sae(self.sae, self.folder, golden_inputs=self.sites.batch(rows).x)
        self.finished = True
        return self.sae

    def _write_log(self, sums: dict[str, Any], lr: float) -> None:
        # Its own steps alone: others may share the data.
        rate = self._spent_on * self.train.batch_size / max(self._spent, 1e-9)
        self._spent, self._spent_on = 0.0, 0
        dead = float(self.dead.dead.float().mean())
        tokens = self.step * self.train.batch_size
        self.last = {"step": self.step - 1, "tokens": tokens, **sums, "dead_fraction_train": dead, "lr": lr}
        if self.log is not None:
            self.log.write(self.last | {"tokens_per_second": round(rate, 1)})

    def _explain(self, batch: Batch) -> str:
        bad = int((~(batch.x.flatten(1).isfinite().all(1) & batch.y.flatten(1).isfinite().all(1))).sum())
        cause = (
            f"{bad} of {len(batch.x)} activations in batch {self.step} are NaN or infinite; harvest them anew"
            if bad
            else f"the loss of batch {self.step} is not finite though its activations are; lower lr"
        )
        saved = list_checkpoints(self.folder) if self.folder is not None else []
        kept = f"the checkpoint of step {saved[-1]} in {self.folder} is intact" if saved else "nothing was saved yet"
        return f"Training stopped at step {self.step}: {cause}; {kept}."


def _chunks(batch: Batch, n: int) -> Iterator[Batch]:
    """The batch in `n` parts; y stays x where it is."""
    for x, y in zip(batch.x.chunk(n), batch.y.chunk(n), strict=True):
        yield Batch(x, x if batch.y is batch.x else y)


def device_of(train: TrainConfig) -> torch.device:
    """Where a run computes. Raises `ValueError` for a device that is unknown or not there."""
    name = train.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device={name!r} cannot be used here ({reason}): give 'cpu', or None for what is there."
        ) from error


def environment(device: torch.device) -> dict[str, Any]:
    """The four things beside seed and data that decide the bits of a run."""
    return {
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "backend": platform.machine(),
    }


def _warn_if_elsewhere(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn when a run goes on under another torch, device or thread count: its bits may then differ."""
    different = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if different:
        warnings.warn(
            f"This run goes on under other conditions ({', '.join(different)}): bits may differ.", stacklevel=5
        )
