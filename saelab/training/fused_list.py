"""A fused step that keeps its pairs in lists of a whole batch, for selections in which a row may keep any number of them.

The lists have room for several times what is needed. Should that not do, the step is void (`kernels/.../step/keep.py`): neither
it nor the steps after it change a weight, a moment, a counter or an average. Its record says so a few steps later, and how
many candidates there were; then the lists are made longer and the steps made again, from the state in which the first of them
began. So nobody ever waits, no candidate is ever lost, and how long a list is changes no bit of a run.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs
from saelab.kernels.triton_backend.sddmm import sum_slices
from saelab.kernels.triton_backend.spmm import spmm_residual
from saelab.kernels.triton_backend.step.gradients import Pairs, fill_gradients, sort_pairs
from saelab.kernels.triton_backend.step.keep import empty_kept
from saelab.kernels.triton_backend.step.kth import empty_bins
from saelab.kernels.triton_backend.step.pair_list import empty_list
from saelab.kernels.triton_backend.step.products import list_products
from saelab.kernels.triton_backend.step.select import Uncertain
from saelab.kernels.triton_backend.step.update import RECORD
from saelab.training.fused_step import FusedStep
from saelab.training.late_records import Record

VOID, FOUND = len(RECORD), RECORD.index("uncertain")
"""Entries of a record: NaN if the step is void, and the number of candidates."""


class FusedListStep(FusedStep):
    """What such steps share. `list_room` is how many candidates fit."""

    list_room: int
    void: Tensor
    record_size = len(RECORD) + 1

    def _allocate(self) -> None:
        device, d_sae = self.sae.W_enc.device, self.sae.d_sae
        n_scores = max((rows.stop - rows.start for rows in self._slices), default=0) * d_sae
        self._scores = torch.empty(n_scores, dtype=torch.float16, device=device)
        self._counted = empty_bins(device)
        self.void = torch.zeros(1, device=device)
        self.set_list_room(self.first_list_room())

    def first_list_room(self) -> int:
        """Room for candidates at the start."""
        raise NotImplementedError

    def kept_room(self) -> int:
        """Room for kept pairs."""
        return self.list_room

    def set_list_room(self, n_pairs: int) -> None:
        """Make lists for `n_pairs` candidates, or for all pairs if there are fewer; they hold nothing yet."""
        device = self.sae.W_enc.device
        self.list_room = min(n_pairs, self.n_rows * self.sae.d_sae)
        self.found = empty_list(self.n_rows, self.list_room, device)
        self.kept = empty_kept(self.n_rows, self.kept_room(), device)
        self._uncertain = Uncertain(self.found.counts, self.found.total)

    def is_void(self, record: Record) -> bool:
        return math.isnan(record.numbers.tolist()[VOID])

    def resized(self, record: Record) -> bool:
        if not self.is_void(record):
            return False
        self.set_list_room(power_of_two(2 * int(record.numbers.tolist()[FOUND])))
        self.void.zero_()
        return True

    @torch.no_grad()
    def run(self, with_aux: bool = False) -> None:
        self._make_step(with_aux)
        self.record[VOID : VOID + 1].copy_(self.void)

    def _make_step(self, with_aux: bool) -> None:
        """The step itself, whose updates do nothing if it is void."""
        super().run(with_aux)

    def _bias_sums(self, residual: Float[Tensor, "batch d_in"]) -> Float[Tensor, " d_in"]:
        return residual.sum(0) + self.void  # if that is NaN, nothing is updated

    def _values(self) -> Float[Tensor, "tiles room"]:
        """Partial sums of the exact values of all candidates."""
        return list_products(self.rows.x, self.sae.W_enc, self.found.features, self.found.rows)

    def _reconstruct(self, bias: Tensor | None, variance: Tensor) -> tuple[Tensor, Tensor, Pairs]:
        kept, x, W_dec = self.kept, self.rows.x, self.sae.W_dec
        pairs = sort_pairs(kept.features, self._bins)
        residual, error = spmm_residual(kept.values, kept.features, kept.offsets, W_dec, bias, x)
        partials = list_products(residual, W_dec, kept.features, kept.rows, (pairs.features, pairs.order))
        dvalues = sum_slices(partials)
        fill_gradients(pairs, kept.values, dvalues, x, residual, variance, self._gradients, kept.rows)
        return residual, error, pairs

    def feature_acts(self) -> SparseActs:
        n = int(self.kept.offsets[-1])
        return SparseActs(self.kept.values[:n], self.kept.features[:n].long(), self.kept.offsets, self.sae.d_sae)

    def selected(self) -> dict[str, float]:
        margin = float(self.record[FOUND] - self.kept.offsets[-1]) / self.n_rows
        return {"margin": round(margin, 1), "certified": 1.0, "recomputed": 0.0}


def power_of_two(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << (max(n, 1) - 1).bit_length()
