"""What makes a training step: autograd for every SAE, or the fused step of `fused_step.py` where that serves.

A step returns the metrics of the steps that are known by now: its own, or those of some steps earlier, so that nobody waits
for a GPU. `settle` returns the rest.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from saelab.distributed.mesh import Mesh
from saelab.kernels.dispatch import backend_name
from saelab.losses import sum_of_squares, total_variance
from saelab.saes import SAE, StepInfo
from saelab.saes.hooks_used import HooksUsed
from saelab.saes.l0_controller import L1SAE
from saelab.saes.token_norm import TOKEN_NORMS
from saelab.training.adam import Adam
from saelab.training.config import TrainConfig
from saelab.training.cuda_graph import Replayed
from saelab.training.data_source import ROW_LABELS, Rows
from saelab.training.dead_bound import DeadBound
from saelab.training.dead_features import DeadFeatures
from saelab.training.device_rows import device_rows
from saelab.training.exchange import Exchange
from saelab.training.fused_table import fused_step_of
from saelab.training.late_records import LAG, LateRecords, Record
from saelab.training.optimizer import apply_step
from saelab.training.resampling import is_due, resample
from saelab.training.running_norm import RunningNorm

Found = list[tuple[int, dict[str, Any]]]
"""Steps and their metrics, in order."""


class Trained(NamedTuple):
    """What a step changes, and what it needs to know."""

    sae: SAE
    adam: Adam
    dead: DeadFeatures
    hooks: HooksUsed
    train: TrainConfig
    mesh: Mesh
    running: RunningNorm | None
    device: torch.device
    rules: int


@runtime_checkable
class Step(Protocol):
    """One optimiser step."""

    def __call__(self, rows: Rows, step: int, lr: float, logged: bool) -> Found:
        """Make step `step`; `logged` asks for all metrics."""
        ...

    def settle(self, step: int) -> Found:
        """The metrics not returned yet; afterwards everything is as it is before `step`, to be saved."""
        ...


def make_step(of: Trained) -> Step:
    """The step that serves."""
    return FusedTraining(of) if fused_serves(of) else AutogradTraining(of)


class AutogradTraining:
    """Any SAE on any number of ranks: the gradient of `sae.loss` by autograd, over the micro-batches."""

    def __init__(self, of: Trained) -> None:
        self._of, self._exchange = of, Exchange(of.sae, of.mesh)
        if of.mesh.world.size > 1 and isinstance(of.sae, L1SAE) and of.sae.config.resample_every is not None:
            raise ValueError(
                f"resample_every={of.sae.config.resample_every} works in a single process; this job has "
                f"{of.mesh.world.size}: start it without torchrun, or leave it at None."
            )

    def __call__(self, rows: Rows, step: int, lr: float, logged: bool) -> Found:
        of = self._of
        info = StepInfo(of.dead.dead, step, of.train.n_steps, rules=of.rules)
        sums: dict[str, Any] = {}
        for micro_batch in of.train.micro_batches:
            for name, value in self._forward_backward(rows, micro_batch, info, logged).items():
                sums[name] = sums.get(name, 0.0) + value
        sums = self._exchange.sum_metrics(sums, of.device)
        self._exchange.sum_gradients()
        shards = of.mesh.feature
        sums["grad_norm"] = apply_step(of.sae, of.adam, lr, of.train.clip_norm, shards, of.running)
        if is_due(of.sae, step, of.train.n_steps):
            sums["resampled"] = self._resample(rows, info)
        if logged:
            dead = shards.all_reduce_sum(of.dead.dead.float().mean()) / shards.size
            sums["dead_fraction_train"] = float(dead)
        return [(step, sums)]

    def settle(self, step: int) -> Found:
        return []

    def _resample(self, rows: Rows, info: StepInfo) -> int:
        of, (name,) = self._of, self._of.hooks.all
        assert isinstance(of.sae, L1SAE)
        return resample(of.sae, of.adam, of.dead, device_rows(rows, name, slice(None), of.device), of.train.seed, info)

    def _forward_backward(self, rows: Rows, micro_batch: range, info: StepInfo, logged: bool) -> dict[str, float]:
        """Accumulate gradients of this rank's rows of `micro_batch`; returns their part of the metrics of the full batch."""
        of = self._of
        ranks = of.mesh.data.sharing(len(micro_batch))
        local = micro_batch[ranks.local_rows]
        here = slice(local.start, local.stop)
        batch = of.hooks.batch({name: device_rows(rows, name, here, of.device) for name in of.hooks.columns})
        if ROW_LABELS in rows:
            batch = batch._replace(labels=rows[ROW_LABELS][here])
        share = len(local) / of.train.batch_size
        loss = of.sae.loss(batch, info._replace(ranks=ranks))
        if loss.total.requires_grad:  # not in an SAE that learns without gradients
            (loss.total * share).backward()
        of.dead.update(loss.feature_acts, ranks)
        values = {"loss": loss.total.item(), "l0": loss.feature_acts.nnz / len(local)}
        if logged:
            values |= {name: term.item() for name, term in loss.terms.items()}
            values["fvu"] = float(sum_of_squares(loss.residual) / total_variance(loss.y, ranks))
        return {name: share * value for name, value in values.items()}


def fused_serves(of: Trained) -> bool:
    """Whether a fused step computes what this run asks for: an SAE of `fused_table.py`, in one process, on a GPU."""
    fused = fused_step_of(of.sae)
    if fused is None or backend_name(of.sae.W_enc) != "triton" or of.rules < fused.since:
        return False
    single = of.mesh.world.size == 1 and len(of.train.micro_batches) == 1 and of.running is None
    return single and of.sae.config.normalize not in TOKEN_NORMS and of.sae.W_enc.dtype == torch.float32


class FusedTraining:
    """The fused step, recorded as CUDA graphs with and without the term for dead features, its metrics some steps late.

    A step whose lists were too short has changed nothing, as all steps after it; when its record comes they are made again.
    """

    def __init__(self, of: Trained) -> None:
        from saelab.training.fused_step import HORIZON

        fused = fused_step_of(of.sae)
        assert fused is not None
        self._of = of
        self.fused = fused.load()(of.sae, of.adam, of.dead, of.train.batch_size, of.train.clip_norm, of.train.n_steps)
        self._without_aux = Replayed(partial(self.fused.run, with_aux=False), of.device)
        self._with_aux = Replayed(partial(self.fused.run, with_aux=True), of.device)
        self._under_way: deque[tuple[Rows, int, float]] = deque()
        """The steps without a record, in order."""
        self._records, self._bound = LateRecords(), DeadBound(of.dead, HORIZON * of.train.batch_size)

    def __call__(self, rows: Rows, step: int, lr: float, logged: bool) -> Found:
        self._make(rows, step, lr)
        return self._take(LAG)

    def _make(self, rows: Rows, step: int, lr: float) -> None:
        """Launch a step."""
        of = self._of
        (name,) = of.hooks.all
        self.fused.load(device_rows(rows, name, slice(None), of.device), lr, step)
        with_aux = self._makes_dead_room()
        (self._with_aux if with_aux else self._without_aux)()
        self.fused.after(step)
        self._records.push(step, self.fused.record, with_aux)
        self._under_way.append((rows, step, lr))

    def _take(self, left: int) -> Found:
        """The metrics of all steps but the newest `left`."""
        found = []
        while len(self._records) > left:
            record = self._records.next()
            if self.fused.resized(record):
                self._with_aux.forget()
                self._without_aux.forget()
            if self.fused.is_void(record):
                self._make_again()
            else:
                self._under_way.popleft()
                found.append(self._metrics(record))
        return found

    def _make_again(self) -> None:
        """Make all steps under way again: none of them has changed anything."""
        self._records.take(0)
        self._bound.forget_rooms()
        steps = list(self._under_way)
        self._under_way.clear()
        for each in steps:
            self._make(*each)

    def settle(self, step: int) -> Found:
        found = self._take(0)
        self._of.adam.note_steps(step)
        return found

    def selection(self) -> dict[str, float]:
        """What the selection of the last step did (`FusedStep.selected`)."""
        return self.fused.selected()

    def _makes_dead_room(self) -> bool:
        """Whether a feature may be dead in the next step: there is then room for the term that trains it."""
        at_most = self._bound.at_most if self.fused.helps_dead else 0
        if at_most and self.fused.make_dead_room(at_most):
            self._with_aux.forget()
        none_needed = 0 if self.fused.helps_dead else self._of.sae.d_sae
        self._bound.note_room(self.fused.dead_room if at_most else none_needed)
        return at_most > 0

    def _metrics(self, record: Record) -> tuple[int, dict[str, Any]]:
        n_dead = self._bound.read(record.step, *self.fused.dead_counts(record))
        return record.step, self.fused.values(record._replace(with_aux=record.with_aux and n_dead > 0))
