"""A TopK training step of fixed shapes for GPUs: no number has to come back to the host before the next step is launched.

It computes what `loss`, `backward` and `apply_step` compute, in some thirty launches, with gradients, clip factor and counters
left on the device. What a step found is copied out in a record that is read a few steps later (`late_records.py`). AuxK has room
for a bound on the number of dead features (`dead_bound.py`); their number itself stays on the device.

Selections are exact as everywhere: candidates from a fp16 product, values in fp32, uncertain rows selected from all features.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs, offsets_of
from saelab.kernels.triton_backend.launch import target_of
from saelab.kernels.triton_backend.sddmm import sum_slices
from saelab.kernels.triton_backend.spmm import spmm_residual
from saelab.kernels.triton_backend.step.auxk import Weights, add_auxk, empty_aux
from saelab.kernels.triton_backend.step.bucket import capacity_for
from saelab.kernels.triton_backend.step.candidates import empty_slots, find_candidates, sizes_of, slices_of
from saelab.kernels.triton_backend.step.dense import decode_dense, dense_gradients, dense_pays, empty_dense
from saelab.kernels.triton_backend.step.gradients import Pairs, empty_gradients, fill_gradients, sort_pairs
from saelab.kernels.triton_backend.step.prepare import (
    Rows,
    prepare_rows,
    prepare_weights,
    product,
    variance_of,
    width_of,
)
from saelab.kernels.triton_backend.step.products import pair_products
from saelab.kernels.triton_backend.step.search_rows import plan_search, search_rows
from saelab.kernels.triton_backend.step.select import VALUES, Scoring, empty_selection, select
from saelab.kernels.triton_backend.step.update import (
    RECORD,
    AdamOptions,
    Moments,
    count_and_norm,
    finish,
    update,
)
from saelab.saes import SAE
from saelab.training.adam import Adam
from saelab.training.dead_features import DeadFeatures
from saelab.training.late_records import LAG, Record

_READ_AS_THEY_ARE = (torch.float32, torch.bfloat16, torch.float16)
HORIZON = 2 * LAG
"""Steps for which the record of a step bounds the number of dead features; it is read after `LAG`."""


class FusedStep:
    """Steps an SAE, its optimiser and its dead-feature counters in place, on batches of `n_rows` rows.

    Others (`fused_table.py`) differ in what pairs are ranked by, or in how they select.
    """

    rough = True
    """Whether a dense step may keep rough values (`candidates.Rough`)."""
    record_size = len(RECORD)
    void: Tensor | None = None
    """On the device, not 0 if a step is void; None if none ever is."""

    def __init__(
        self, sae: SAE, adam: Adam, dead: DeadFeatures, n_rows: int, clip_norm: float, n_steps: int = 0
    ) -> None:
        self.sae, self.adam, self.dead, self.n_rows, self.n_steps = sae, adam, dead, n_rows, n_steps
        target_of(sae.W_enc.device)  # refuses what the kernels cannot run on
        device, (d_sae, d_in) = sae.W_enc.device, sae.W_enc.shape
        width = width_of(d_in)
        empty, half = torch.empty, torch.float16
        bounds = empty(2, n_rows, device=device)
        self.rows = Rows(empty(n_rows, d_in, device=device), empty(n_rows, width, dtype=half, device=device), bounds)
        self._low, self._norms = empty(d_sae, width, dtype=half, device=device), empty(2, d_sae, device=device)
        self._slices = slices_of(n_rows, d_sae)
        self._allocate()
        self._gradients = empty_gradients(sae.W_dec)
        self._bins = torch.arange(d_sae + 1, dtype=torch.int32, device=device)
        self._db_dec, self._control = empty(d_in, device=device), torch.zeros(2, device=device)
        self.record, self.schedule = (
            torch.zeros(self.record_size, device=device),
            torch.zeros(len(self.numbers(0.0, 0)), device=device),
        )
        self._moments = [Moments(p, *adam.moments(p)) for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)]
        decay = sae.weight_decay.get(sae.W_enc, 0.0)
        self._options = AdamOptions(*adam.betas, adam.eps, clip_norm, decay)
        self._aux: Any = None
        """Room for the term that trains dead features."""

    def _allocate(self) -> None:
        """Allocate what the selection needs."""
        sae, n_rows = self.sae, self.n_rows
        device, d_sae, k = sae.W_enc.device, sae.d_sae, sae.config.k
        self._plan = plan_search(d_sae, k, len(self._slices))
        n_scores = max((rows.stop - rows.start for rows in self._slices), default=0) * d_sae
        self._scores = torch.empty(
            max(n_scores, n_rows * self._plan.row_bytes // 2), dtype=torch.float16, device=device
        )
        dense = dense_pays(d_sae, k) and len(self._slices) == 1
        self._dense = empty_dense(n_rows, sae.W_dec.detach(), self._scores) if dense else None
        self.slots = empty_slots(n_rows, k, device, rough=dense and self.rough)
        self.selection, self._uncertain = empty_selection(n_rows, k, device)
        self._offsets = torch.arange(0, n_rows * k + 1, k, device=device)

    def scoring(self) -> Scoring:
        """What the pairs of a row are ranked by."""
        return VALUES

    @torch.no_grad()
    def load(self, x: Float[Tensor, "batch d_in"], lr: float, step: int) -> None:
        """Take the raw rows of a batch, on the device, and the learning rate of step `step` (from 0).

        Raises `ValueError` for rows of another shape than the step was made for.
        """
        sae = self.sae
        if x.shape != self.rows.x.shape:
            raise ValueError(
                f"This SAE reads activations of width d_in={sae.d_in}, {self.n_rows} rows a batch; got a tensor of shape "
                f"{tuple(x.shape)}: pass (n_tokens, d_in) from the hook it is trained on."
            )
        x = x if x.dtype in _READ_AS_THEY_ARE else x.float()
        prepare_rows(x, sae.center, sae.scale, sae.pre_bias, self.rows)
        numbers = torch.tensor(self.numbers(lr, step), dtype=torch.float32)
        pinned = numbers.pin_memory() if self.schedule.is_cuda else numbers
        self.schedule.copy_(pinned, non_blocking=True)

    def numbers(self, lr: float, step: int) -> list[float]:
        """What changes from step to step, as the kernels read it."""
        beta1, beta2 = self.adam.betas
        return [lr, 1 - beta1 ** (step + 1), (1 - beta2 ** (step + 1)) ** 0.5]

    @property
    def helps_dead(self) -> bool:
        """Whether a term of the loss trains dead features."""
        return bool(self.sae.config.auxk_alpha)

    @property
    def dead_room(self) -> int:
        """The number of dead features that this term has room for."""
        return 0 if self._aux is None else self._aux.bucket.ids.shape[0]

    def make_dead_room(self, n_dead: int) -> bool:
        """Make room for so many dead features; whether that changed it. Room is kept until four times less would do."""
        needed = capacity_for(n_dead, self.sae.d_sae)
        if needed <= self.dead_room < 4 * needed:
            return False
        self._aux = None  # before there is another
        self._aux = self._empty_aux(needed)
        return True

    def _empty_aux(self, capacity: int) -> Any:
        """Room for `capacity` dead features."""
        config, signed = self.sae.config, self.scoring().magnitude
        return empty_aux(capacity, config.k_aux or max(self.sae.d_in // 2, 1), config.auxk_alpha, self.rows.x, signed)

    @torch.no_grad()
    def run(self, with_aux: bool = False) -> None:
        """One step on the loaded rows; `with_aux` for the features that are dead, if any is."""
        sae, x = self.sae, self.rows.x
        variance = variance_of(x)
        self._select()
        bias = None if sae.pre_bias is not None else sae.b_dec
        residual, error, pairs = self._reconstruct(bias, variance)
        losses = self._add_aux(residual, error, variance) if with_aux else None
        through = self._gradients.b_enc @ sae.W_enc if sae.pre_bias is not None else None
        parallel, each = count_and_norm(self._gradients, sae.W_dec, pairs, *self._counters())
        W_enc, W_dec, b_enc, b_dec = self._moments
        finish(
            error, variance, each, pairs, self._uncertain.count, self._bias_sums(residual), through, self.schedule, b_dec,
            self._db_dec, self._control, self.record, self._options, losses,
        )  # fmt: skip
        update(W_enc, W_dec, b_enc, self._gradients, parallel, self._control, self.schedule, self._options)

    def _counters(self) -> tuple[Tensor, int, int, int, Tensor | None]:
        """Those of dead features, what a step adds, from where on a feature is dead, or may be so before long; and the flag of
        void steps."""
        window = self.dead.window
        return self.dead.tokens_since_fired, self.n_rows, window, window - HORIZON * self.n_rows, self.void

    def _bias_sums(self, residual: Float[Tensor, "batch d_in"]) -> Float[Tensor, " d_in"]:
        """The column sums of the residual: the gradient of `b_dec`, but for its scale."""
        return residual.sum(0)

    def after(self, step: int) -> None:
        """What else a step changes, launched behind it."""

    def resized(self, record: Record) -> bool:
        """Whether lists were made longer or shorter for what a step has found; launches must then be recorded again."""
        return False

    def is_void(self, record: Record) -> bool:
        """Whether the step has changed nothing, as all after it, because a list was too short: it must be made again."""
        return False

    def _reconstruct(self, bias: Tensor | None, variance: Tensor) -> tuple[Tensor, Tensor, Pairs]:
        """Residual, its squared norm and the sorted pairs of the selection; fills the gradients of the weights."""
        (values, features, counts, keys), x, W_dec = self.selection, self.rows.x, self.sae.W_dec
        pairs = sort_pairs(keys, self._bins)
        if self._dense is not None:
            residual, error = decode_dense(self.selection, W_dec, bias, x, self._dense)
            low = self.rows.low[:, : x.shape[1]]
            dense_gradients(self.selection, low, variance, self._dense, self._gradients)
            return residual, error, pairs
        residual, error = spmm_residual(values.view(-1), features.view(-1), self._offsets, W_dec, bias, x)
        partials = pair_products(residual, W_dec, features, counts, by_feature=(pairs.features, pairs.order))
        fill_gradients(pairs, values, sum_slices(partials), x, residual, variance, self._gradients)
        return residual, error, pairs

    def _select(self) -> None:
        """Fill `selection` from the loaded rows."""
        sae, k, scoring = self.sae, self.sae.config.k, self.scoring()
        prepare_weights(sae.W_enc, sae.b_enc, self._low, self._norms, scoring.norms)
        sizes = sizes_of(self._norms, with_most=self.slots.rough is not None)
        both_signs = sae.b_enc if scoring.magnitude else None
        for rows in self._slices:
            scores = self._scores[: (rows.stop - rows.start) * sae.d_sae].view(-1, sae.d_sae)
            product(self.rows.low[rows], self._low, scores)
            find_candidates(scores, self.rows.bounds, sizes, k, rows.start, self.slots, both_signs)
        operands = self.rows.x, sae.W_enc, sae.b_enc
        select(*operands, self.slots, self.selection, self._uncertain, scoring)
        search_rows(*operands, self._uncertain, self._plan, self._scores.view(torch.int64), self.selection, scoring)

    def _add_aux(self, residual: Float[Tensor, "batch d_in"], error: Tensor, variance: Tensor) -> Tensor:
        """Add the gradients of AuxK to those of the dead features; returns the shares of its loss."""
        weights = Weights(self.sae.W_enc, self.sae.b_enc, self.sae.W_dec)
        dead = self.dead.tokens_since_fired, self.dead.window
        add_auxk(self.rows.x, residual, error, weights, dead, self._aux, self._gradients)
        return self._aux.losses

    def feature_acts(self) -> SparseActs:
        """What the last step selected. Waits."""
        values, features, counts, _ = self.selection
        kept = torch.arange(values.shape[1], device=counts.device) < counts[:, None]
        return SparseActs(values[kept], features[kept].long(), offsets_of(counts.long()), self.sae.d_sae)

    def values(self, record: Record) -> dict[str, Any]:
        """The metrics in the record of a step; `with_aux` if features were dead."""
        numbers = dict(zip(RECORD, record.numbers.tolist(), strict=False))
        aux = {"auxk": numbers["auxk"]} if record.with_aux else {}
        loss = numbers["fvu"] + sum(self.sae.config.auxk_alpha * term for term in aux.values())
        found: dict[str, Any] = {"loss": loss, "l0": numbers["nnz"] / self.n_rows, "fvu": numbers["fvu"], **aux}
        return found | {"grad_norm": numbers["grad_norm"], "dead_fraction_train": numbers["dead"] / self.sae.d_sae}

    def dead_counts(self, record: Record) -> tuple[int, int]:
        """The numbers of features that are dead after a step, and that may be so `HORIZON` steps later."""
        numbers = record.numbers.tolist()
        return int(numbers[RECORD.index("dead")]), int(numbers[RECORD.index("dead_soon")])

    def selected(self) -> dict[str, float]:
        """Of the last step: candidates a row beyond k, and the shares of rows that were certain and selected again. Waits."""
        again = float(self.record[RECORD.index("uncertain")]) / self.n_rows
        margin = float(self.slots.counts.float().mean()) - self.sae.config.k
        return {"margin": round(margin, 1), "certified": round(1 - again, 6), "recomputed": round(again, 6)}
