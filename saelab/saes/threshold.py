"""SAEs that select over a whole batch in training and by a threshold at inference, so that a token's feature activations
are independent of the rest of its batch: `z = u` where `u > threshold` (strict).

During training the threshold is the mean over batches of the smallest value kept (Bussmann et al. 2024, "BatchTopK", eq. 5):
an exponential average while the weights still move, then the plain mean over the last twentieth of the run. At the end it is
calibrated so that on average k features fire on held-out rows (`calibration.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.distributed.global_topk import GlobalPairs
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.calibration import LOOSER_FACTORS, level_for
from saelab.saes.selection import SelectionSAE
from saelab.saes.step import StepInfo

DECAY = 0.999
LAST = 0.05
UNSET = -1.0


class ThresholdSAE(SelectionSAE):
    """`threshold` is one number, or one per feature if `threshold_shape` is `(d_sae,)`."""

    extension_points = SelectionSAE.extension_points | {
        "encode_above",
        "scores",
        "observe",
        "global_pairs",
        "known_threshold",
    }
    selection_rule = "u > threshold"

    def __init__(self, config: Any, d_in: int, seed: int = 0, threshold_shape: tuple[int, ...] = ()) -> None:
        super().__init__(config, d_in, seed)
        self.threshold: Tensor
        self.n_observed: Tensor
        self.register_buffer("threshold", torch.full(threshold_shape, UNSET))
        self.register_buffer("n_observed", torch.zeros(threshold_shape, dtype=torch.int64))
        self._last_stretch = -1

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return self.encode_above(x, self.known_threshold())

    def encode_above(self, x: Float[Tensor, "batch d_in"], threshold: Tensor) -> SparseActs:
        """Feature activations whose score is above `threshold`."""
        return encode_threshold(x, self.W_enc, self.b_enc, threshold, center=self.pre_bias)

    def scores(self, feature_acts: SparseActs) -> Float[Tensor, " nnz"]:
        """What is compared with the threshold."""
        return feature_acts.values.detach()

    def calibrate(self, x: Float[Tensor, "n ..."]) -> bool:
        """Scale all thresholds by one factor, which keeps the ratios between features."""
        factor = self.factor_for(self.config.k, x)
        if factor is not None:
            self.threshold.mul_(factor)
        return factor is not None

    def factor_for(self, l0: float, x: Float[Tensor, "n ..."]) -> float | None:
        """The factor on all thresholds with which on average `l0` features fire per row of raw `x`, as `level_for` finds it."""
        threshold = self.known_threshold()

        def ratios(rows: Tensor, factor: float) -> Tensor:
            feature_acts = self.encode_above(self.normalize(rows), threshold * factor)
            return self.scores(feature_acts) / (threshold if threshold.ndim == 0 else threshold[feature_acts.features])

        return level_for(l0, x, ratios, LOOSER_FACTORS)

    def known_threshold(self) -> Tensor:
        """The threshold. Raises `ValueError` if training has not set it (`u > -1` would keep nearly everything)."""
        if bool((self.n_observed == 0).all()):
            raise ValueError(
                f"This {self.variant} SAE has no threshold yet; training sets it. Train it, or load a trained one."
            )
        return self.threshold.masked_fill(self.n_observed == 0, torch.inf)  # a feature that was never kept stays silent

    def global_pairs(self, info: StepInfo) -> GlobalPairs | None:
        """The pairs of all ranks that share the batch; None for a single rank."""
        return GlobalPairs(info.ranks, self.d_sae, info.ranks.local_rows.start) if info.ranks.size > 1 else None

    @torch.no_grad()
    def observe(self, smallest: Tensor, info: StepInfo) -> None:
        """Update the threshold with the smallest kept score of a batch, infinite if nothing was kept."""
        smallest = info.ranks.all_reduce_min(smallest)
        last = last_stretch(info.n_steps)
        if info.step == last and (self._last_stretch != last or info.rules < 2):  # once, not for each micro-batch
            self.n_observed.zero_()
            self._last_stretch = last
        self.average(smallest, info.step < last)

    @torch.no_grad()
    def average(self, smallest: Tensor, moving: bool) -> None:
        """Average the smallest kept score of one more batch; while weights are still `moving`, late batches weigh more."""
        seen = smallest < torch.inf  # NaN is not
        rate = (1 / (self.n_observed + 1)).clamp_min(1 - DECAY if moving else 0).to(self.threshold)
        self.threshold.copy_(torch.where(seen, self.threshold.lerp(smallest.to(self.threshold), rate), self.threshold))
        self.n_observed += seen


def last_stretch(n_steps: int) -> int:
    """The step from which on the threshold is a plain mean."""
    return n_steps - max(1, int(LAST * n_steps))


def smallest(scores: Float[Tensor, " nnz"]) -> Float[Tensor, ""]:
    """The smallest score; infinite if there are none."""
    return scores.detach().min() if scores.numel() else scores.new_tensor(torch.inf)
