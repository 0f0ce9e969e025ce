"""The fused step of a BatchTopK SAE: the k B largest pre-activations of a batch of B tokens are kept.

A lower bound on the last of them is found from group maxima of lower bounds of all scores (`kth.py`): every pair that can be
kept is a candidate, and no selection is ever uncertain. If the scores come in several slices, the product is made twice for
each: the floor has to be known before candidates are collected.
"""

from __future__ import annotations

from typing import cast

import torch

from saelab.kernels.triton_backend.step.keep import keep
from saelab.kernels.triton_backend.step.kth import count_floors, nth_bin, nth_largest, values_of
from saelab.kernels.triton_backend.step.pair_list import collect
from saelab.kernels.triton_backend.step.prepare import prepare_weights, product
from saelab.saes.batch_topk import BatchTopKSAE
from saelab.saes.threshold import last_stretch
from saelab.training.fused_list import FusedListStep, power_of_two

_ROOM = 2
"""Room for candidates, in kept pairs, before the next power of two."""


class FusedBatchTopK(FusedListStep):
    """Its threshold is averaged on the device."""

    def _allocate(self) -> None:
        device = self.sae.W_enc.device
        self._floor, self._last = torch.zeros(2, 2, dtype=torch.int32, device=device)
        self._smallest = torch.zeros((), device=device)
        super()._allocate()

    def first_list_room(self) -> int:
        return power_of_two(_ROOM * self.kept_room())

    def kept_room(self) -> int:
        return self.n_rows * self.sae.config.k

    def _select(self) -> None:
        sae, found = self.sae, self.found
        prepare_weights(sae.W_enc, sae.b_enc, self._low, self._norms)
        for rows in self._slices:
            sizes = self.rows.bounds, self._norms, sae.b_enc
            count_floors(self._product(rows), *sizes, rows.start, sae.config.k, self._counted)
        nth_bin(self._counted, self._floor, self.kept_room())
        found.features.fill_(sae.d_sae)
        for rows in self._slices:
            scores = self._scores.view(-1, sae.d_sae) if len(self._slices) == 1 else self._product(rows)
            collect(scores, self._floor, rows.start, found)
        values_of(self._values(), found.features, sae.b_enc, sae.d_sae, found.values, self._counted)
        nth_largest(found.values, self.kept_room(), self._last, self._counted)
        keep(found, self._last, None, sae.d_sae, self.void, self.kept)
        torch.amin(self.kept.values, 0, out=self._smallest)

    def _product(self, rows: slice) -> torch.Tensor:
        """Upper bounds on the scores of these rows."""
        scores = self._scores[: (rows.stop - rows.start) * self.sae.d_sae].view(-1, self.sae.d_sae)
        product(self.rows.low[rows], self._low, scores)
        return scores

    @torch.no_grad()
    def after(self, step: int) -> None:
        sae, last = cast("BatchTopKSAE", self.sae), last_stretch(self.n_steps)
        if step == last:
            sae.n_observed.masked_fill_((self.void == 0).squeeze(0), 0)
        sae.average((self._smallest + self.void).squeeze(0), step < last)  # which leaves out NaN
