"""The fused steps of ReLU and JumpReLU SAEs, which keep every pair above a threshold: as many as there are.

How many that is changes by a factor of a hundred in a run: half of all features at the start of a ReLU SAE, a few dozen at its
end. Dense fp32 products cost the same throughout, some thirty times the work of what is kept in the end, and those with half the
precision would not have the values that the general step has. So pairs are listed here too (`fused_list.py`), in lists whose
length follows what steps some time ago have found: a list that is too short makes a step void, to be made again with a longer
one, and one much too long is made shorter. The cost of a step follows L0, and its bits depend on no length.

The candidates of a pre-activation above its floor are those whose upper bound is above it, so none is ever missed. The L0
controller moves on the device, before the gradients that its coefficient scales.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs
from saelab.kernels.triton_backend.sddmm import sum_slices
from saelab.kernels.triton_backend.spmm import spmm_residual
from saelab.kernels.triton_backend.step.gradients import Pairs, fill_gradients, sort_pairs
from saelab.kernels.triton_backend.step.keep import keep
from saelab.kernels.triton_backend.step.kth import values_of
from saelab.kernels.triton_backend.step.pair_list import collect
from saelab.kernels.triton_backend.step.penalty import (
    LINEAR,
    Penalty,
    activate,
    empty_slopes,
    empty_sums,
    fill_slopes,
    sum_by_feature,
)
from saelab.kernels.triton_backend.step.prepare import prepare_weights, product, variance_of
from saelab.kernels.triton_backend.step.products import list_products
from saelab.kernels.triton_backend.step.strength import Controller, Square, find_strength
from saelab.kernels.triton_backend.step.update import count_and_norm, finish, update
from saelab.saes import l0_controller
from saelab.training.fused_list import FOUND, VOID, FusedListStep, power_of_two
from saelab.training.late_records import Record

_LEAST_ROOM = 1 << 14
_MORE = ("fvu", "penalty", "strength", "of_l0", "variance")
"""Entries of a record after that of `fused_list`."""


class FusedThreshold(FusedListStep):
    """A ReLU SAE; JumpReLU adds thresholds (`fused_jumprelu.py`)."""

    record_size = VOID + 1 + len(_MORE)
    term = "l1"
    """The penalty's name in the log."""
    with_theta = False
    """Whether thresholds are learned."""

    def _allocate(self) -> None:
        device, d_sae = self.sae.W_enc.device, self.sae.d_sae
        self._sums, self._strength = empty_sums(d_sae, device), torch.zeros(4, device=device)
        self._fired = torch.zeros(d_sae + 1, dtype=torch.int64, device=device)
        self._n_active = torch.zeros(1, dtype=torch.int32, device=device)
        self._divisor = torch.full((), float(self.n_rows), device=device)
        self._controller = controller_of(self.sparsity)
        super()._allocate()

    @property
    def sparsity(self) -> l0_controller.L0Controller:
        return self.sae.get_submodule("sparsity")  # pyright: ignore[reportReturnType]

    @property
    def helps_dead(self) -> bool:
        return False

    @property
    def penalty(self) -> Penalty:
        """The sparsity penalty."""
        return Penalty(LINEAR, 1.0, 1.0, to_input=False)

    @property
    def square(self) -> Square:
        """Whether the square of a deviation from a target is penalised."""
        return Square(0.0, 0.0)

    def first_list_room(self) -> int:
        return max(_LEAST_ROOM, int(1.25 * self.sae.peak_l0(self.sae.config) * self.n_rows))

    def set_list_room(self, n_pairs: int) -> None:
        super().set_list_room(n_pairs)
        self._slopes = empty_slopes(self.list_room, self.sae.W_enc.device)

    def resized(self, record: Record) -> bool:
        if super().resized(record):
            return True
        enough = max(power_of_two(2 * int(record.numbers.tolist()[FOUND])), _LEAST_ROOM)
        if self.list_room < 4 * enough:
            return False
        self.set_list_room(enough)
        return True

    def numbers(self, lr: float, step: int) -> list[float]:
        """As `find_strength` reads them, behind those of Adam."""
        sparsity, n_steps = self.sparsity, max(self.n_steps, 1)
        risen = min(1.0, (step + 1) / max(1.0, sparsity.warmup * n_steps))
        left = max(0.0, 1 - step / (l0_controller.RAMP_FRACTION * n_steps))
        annealed = min(1.0, (n_steps - step) / (l0_controller.ANNEAL_FRACTION * n_steps))
        ends = [math.log(sparsity.start * by) if sparsity.start > 0 else 0.0 for by in l0_controller.INTEGRAL_LIMITS]
        more = [sparsity.start * risen, risen, left, l0_controller.INTEGRAL_GAIN * annealed, float(step), *ends]
        return [*super().numbers(lr, step), *more]

    def thresholds(self) -> tuple[Tensor | None, Tensor | None]:
        """Theta, and what a pre-activation has to exceed to be kept, of each feature."""
        return None, None

    def norms(self) -> Float[Tensor, " d_sae"] | None:
        """Decoder norms, where the penalty reads them."""
        return self.sae.decoder_norms

    def _make_step(self, with_aux: bool) -> None:
        sae, x, W_dec, b_dec = self.sae, self.rows.x, self.sae.W_dec, self.sae.b_dec
        variance, (theta, floors), norms = variance_of(x), self.thresholds(), self.norms()
        self._list(floors)
        activate(self.kept, theta, sae.d_sae, self._slopes, self._n_active)
        schedule = self.schedule[3:]
        find_strength(self._n_active, schedule, self.void, self.n_rows, self._controller, self.square, self._strength)
        z, kept, bias = self._slopes.feature_acts, self.kept, None if sae.pre_bias is not None else b_dec
        pairs = sort_pairs(kept.features, self._bins)
        residual, error = spmm_residual(z, kept.features, kept.offsets, W_dec, bias, x)
        partials = list_products(residual, W_dec, kept.features, kept.rows, (pairs.features, pairs.order))
        fill_slopes(kept, theta, norms, self._strength, sum_slices(partials), self.penalty, sae.d_sae, self._slopes)
        listed = x, residual, self._divisor, self._gradients, kept.rows
        fill_gradients(pairs, z, self._slopes.du, *listed)
        sum_by_feature(pairs, self._slopes, theta, norms, W_dec, self.n_rows, self._gradients, self._sums)
        losses = self._add_aux(residual, error, variance) if with_aux else None
        self._step_weights(pairs, error, residual, losses)
        explained = error / variance.clamp_min(torch.finfo(torch.float32).tiny)
        more = [explained, self._sums.penalty.sum() / self.n_rows, self._strength[0], self._strength[2], variance]
        self.record[VOID + 1 :].copy_(torch.stack(more))

    def _list(self, floors: Tensor | None) -> None:
        """Fill `kept` from the loaded rows: the pre-activations above their floors."""
        sae, found, d_sae = self.sae, self.found, self.sae.d_sae
        prepare_weights(sae.W_enc, sae.b_enc, self._low, self._norms, floors=floors)
        found.features.fill_(d_sae)
        for rows in self._slices:
            scores = self._scores[: (rows.stop - rows.start) * d_sae].view(-1, d_sae)
            product(self.rows.low[rows], self._low, scores)
            collect(scores, None, rows.start, found)
        values_of(self._values(), found.features, sae.b_enc, d_sae, found.values, None)
        keep(found, None, floors, d_sae, self.void, self.kept)

    def _step_weights(self, pairs: Pairs, error: Tensor, residual: Tensor, losses: Tensor | None) -> None:
        """Counters, norm, Adam."""
        sae, unit = self.sae, self.sae.unit_norm
        torch.cumsum(self._sums.fired, 0, out=self._fired[1:])
        active = pairs._replace(offsets=self._fired)
        parallel, each = count_and_norm(self._gradients, sae.W_dec, active, *self._counters(), unit)
        if self.with_theta:
            each[:, 0].addcmul_(self._sums.dtheta, self._sums.dtheta)
        through = self._gradients.b_enc @ sae.W_enc if sae.pre_bias is not None else None
        W_enc, W_dec, b_enc, b_dec, *_ = self._moments
        finish(
            error, self._divisor, each, active, self._uncertain.count, self._bias_sums(residual), through, self.schedule, b_dec,
            self._db_dec, self._control, self.record, self._options, losses,
        )  # fmt: skip
        control = self._control, self.schedule, self._options
        update(W_enc, W_dec, b_enc, self._gradients, parallel, *control, unit)

    def feature_acts(self) -> SparseActs:
        n, kept = int(self.kept.offsets[-1]), self.kept
        listed = SparseActs(self._slopes.feature_acts[:n], kept.features[:n].long(), kept.offsets, self.sae.d_sae)
        return listed.where(listed.values != 0)

    def values(self, record: Record) -> dict[str, Any]:
        numbers = record.numbers.tolist()
        sse, nnz, norm, dead = numbers[:4]
        fvu, penalty, strength, of_l0, _ = numbers[VOID + 1 :]
        term = of_l0 if self.norms_unread else penalty
        return {
            "loss": sse + strength * term, "l0": nnz / self.n_rows, "sse": sse, self.term: term, "coefficient": strength,
            "fvu": fvu, "grad_norm": norm, "dead_fraction_train": dead / self.sae.d_sae,
        }  # fmt: skip

    @property
    def norms_unread(self) -> bool:
        """Whether the number of active features is penalised, not their activations."""
        return False


def controller_of(sparsity: l0_controller.L0Controller) -> Controller:
    """The controller of an SAE as the kernel reads it."""
    moves = sparsity.target_l0 is not None
    return Controller(
        sparsity.state if moves else None,
        sparsity.last_step if moves else None,
        math.log(sparsity.target_l0 or 1.0),
        l0_controller.MIN_L0,
        l0_controller.ERROR_CLIP,
        l0_controller.PROPORTIONAL_GAIN,
        l0_controller.EMA_DECAY,
    )
