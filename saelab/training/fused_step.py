"""A TopK training step of fixed shapes for GPUs: no number has to come back to the host before the next step is launched.

It computes what `loss`, `backward` and `apply_step` compute, in some thirty launches, with gradients, clip factor and counters
left on the device. What a step found is copied out in a record that is read a few steps later (`late_records.py`). Only if a
feature is dead, or may soon be, the host asks for the number of dead features before a step, as the shape of AuxK depends on it.

Selections are exact as everywhere: candidates from a fp16 product, values in fp32, uncertain rows selected from all features.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs, offsets_of
from saelab.kernels.triton_backend.launch import target_of
from saelab.kernels.triton_backend.sddmm import sum_slices
from saelab.kernels.triton_backend.spmm import spmm_residual
from saelab.kernels.triton_backend.step.candidates import Sizes, empty_slots, find_candidates, slices_of
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
from saelab.losses import auxk
from saelab.saes import SAE
from saelab.training.adam import Adam
from saelab.training.dead_features import DeadFeatures
from saelab.training.late_records import Record

_READ_AS_THEY_ARE = (torch.float32, torch.bfloat16, torch.float16)
HORIZON = 16
"""Steps for which a record that finds no feature near death vouches."""


class FusedStep:
    """Steps an SAE, its optimiser and its dead-feature counters in place, on batches of `n_rows` rows.

    Others (`fused_table.py`) differ in what pairs are ranked by, or in how they select.
    """

    rough = True
    """Whether a dense step may keep rough values (`candidates.Rough`)."""
    record_size = len(RECORD)

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
        self._make_room()
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

    def _make_room(self) -> None:
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

    @torch.no_grad()
    def run(self, dead: Int[Tensor, " n_dead"] | None = None) -> None:
        """One step on the loaded rows, with AuxK if there are `dead` features (their ids)."""
        sae, x = self.sae, self.rows.x
        variance = variance_of(x)
        self._select()
        bias = None if sae.pre_bias is not None else sae.b_dec
        residual, error, pairs = self._reconstruct(bias, variance)
        if dead is not None:
            self._add_aux(dead, residual)
        through = self._gradients.b_enc @ sae.W_enc if sae.pre_bias is not None else None
        window = self.dead.window
        counted = self._gradients, sae.W_dec, pairs, self.dead.tokens_since_fired, self.n_rows, window
        parallel, each = count_and_norm(*counted, window - HORIZON * self.n_rows)
        W_enc, W_dec, b_enc, b_dec = self._moments
        finish(
            error, variance, each, pairs, self._uncertain.count, self._bias_sums(residual), through, self.schedule, b_dec,
            self._db_dec, self._control, self.record, self._options,
        )  # fmt: skip
        update(W_enc, W_dec, b_enc, self._gradients, parallel, self._control, self.schedule, self._options)

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
            dense_gradients(self.selection, low, residual, variance, self._dense, self._gradients)
            return residual, error, pairs
        residual, error = spmm_residual(values.view(-1), features.view(-1), self._offsets, W_dec, bias, x)
        partials = pair_products(residual, W_dec, features, counts, by_feature=(pairs.features, pairs.order))
        fill_gradients(pairs, values, sum_slices(partials), x, residual, variance, self._gradients)
        return residual, error, pairs

    def _select(self) -> None:
        """Fill `selection` from the loaded rows."""
        sae, k, scoring = self.sae, self.sae.config.k, self.scoring()
        prepare_weights(sae.W_enc, sae.b_enc, self._low, self._norms, scoring.norms)
        sizes = Sizes(self._norms, self._norms.mean(1), None if self.slots.rough is None else self._norms.amax(1))
        both_signs = sae.b_enc if scoring.magnitude else None
        for rows in self._slices:
            scores = self._scores[: (rows.stop - rows.start) * sae.d_sae].view(-1, sae.d_sae)
            product(self.rows.low[rows], self._low, scores)
            find_candidates(scores, self.rows.bounds, sizes, k, rows.start, self.slots, both_signs)
        operands = self.rows.x, sae.W_enc, sae.b_enc
        select(*operands, self.slots, self.selection, self._uncertain, scoring)
        search_rows(*operands, self._uncertain, self._plan, self._scores.view(torch.int64), self.selection, scoring)

    def _add_aux(self, dead: Int[Tensor, " n_dead"], residual: Float[Tensor, "batch d_in"]) -> None:
        """Add the gradients of AuxK to those of the dead features, and its loss to the record."""
        sae, config = self.sae, self.sae.config
        with torch.enable_grad():
            W_enc, W_dec, b_enc = (p.detach()[dead].requires_grad_() for p in (sae.W_enc, sae.W_dec, sae.b_enc))
            loss = auxk(self.rows.x, -residual, W_enc, b_enc, W_dec, config.k_aux or max(sae.d_in // 2, 1))
            gradients = torch.autograd.grad(config.auxk_alpha * loss, (W_enc, W_dec, b_enc))
        for total, more in zip(self._gradients, gradients, strict=True):
            total.index_add_(0, dead, more)  # each row once: no sum depends on an order
        self.record[RECORD.index("auxk")] = loss.detach()

    def feature_acts(self) -> SparseActs:
        """What the last step selected. Waits."""
        values, features, counts, _ = self.selection
        kept = torch.arange(values.shape[1], device=counts.device) < counts[:, None]
        return SparseActs(values[kept], features[kept].long(), offsets_of(counts.long()), self.sae.d_sae)

    def values(self, record: Record) -> dict[str, Any]:
        """The metrics in the record of a step, and under "none_dead_soon" whether none can be dead for `HORIZON` steps."""
        numbers = dict(zip(RECORD, record.numbers.tolist(), strict=False))
        aux = {"auxk": numbers["auxk"]} if record.with_aux else {}
        loss = numbers["fvu"] + sum(self.sae.config.auxk_alpha * term for term in aux.values())
        found: dict[str, Any] = {"loss": loss, "l0": numbers["nnz"] / self.n_rows, "fvu": numbers["fvu"], **aux}
        found |= {"grad_norm": numbers["grad_norm"], "dead_fraction_train": numbers["dead"] / self.sae.d_sae}
        return found | {"none_dead_soon": not numbers["dead_soon"]}

    def selected(self) -> dict[str, float]:
        """Of the last step: candidates a row beyond k, and the shares of rows that were certain and selected again. Waits."""
        again = float(self.record[RECORD.index("uncertain")]) / self.n_rows
        margin = float(self.slots.counts.float().mean()) - self.sae.config.k
        return {"margin": round(margin, 1), "certified": round(1 - again, 6), "recomputed": round(again, 6)}
