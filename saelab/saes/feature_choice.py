"""Feature Choice SAE (Ayonrinde 2024, arXiv 2411.02124): each feature keeps the m_i tokens of the batch where its
pre-activation is largest, so that no feature can die; the m_i add up to k B.

The capacities m_i follow Zipf's law over the features' frequency ranks (or are all equal). With `progressive` the first half
of the run is Mutual Choice; then the capacities move from what that selection grants each feature to Zipf's law, and the
last quarter is Feature Choice alone (the paper does not publish its formulas; these are ours). At inference each feature
has its own threshold (`threshold.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.distributed.global_topk import keep_by_feature
from saelab.kernels.encode_batch_topk import encode_batch_topk
from saelab.kernels.encode_feature_topk import encode_feature_topk
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.selection import SelectionConfig
from saelab.saes.step import StepInfo
from saelab.saes.threshold import ThresholdSAE
from saelab.saes.zipf import Density, zipf_capacity
from saelab.validation import check_at_least

RANK_EVERY = 100
PURE_FROM = 0.75


@dataclass(frozen=True)
class FeatureChoiceConfig(SelectionConfig):
    """A dictionary of `d_sae` features of which on average `k` fire per token, each within its capacity."""

    aux: Literal["auxk", "aux_zipf"] = "aux_zipf"
    """Features that the aux loss trains: dead ones; with "aux_zipf" also any below a tenth of their density under Zipf's law."""
    budget: Literal["zipf", "uniform"] = "zipf"
    """Capacity of each feature: by Zipf's law from its frequency rank, or the same for all."""
    zipf_exponent: float = 1.0
    """Weight of rank r is 1 / (r + zipf_shift) ** zipf_exponent."""
    zipf_shift: float = 0.0
    """2.7 gives the Zipf-Mandelbrot law."""
    progressive: bool = True
    """Start as Mutual Choice; False means Feature Choice from the first step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "zipf_exponent", "zipf_shift")


class FeatureChoiceSAE(ThresholdSAE):
    """Keeps each feature's largest pre-activations over the batch."""

    variant = "feature_choice"
    Config = FeatureChoiceConfig
    config: FeatureChoiceConfig

    def __init__(self, config: FeatureChoiceConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed, threshold_shape=(config.d_sae,))
        self.ranking = Density(self.d_sae)
        self.register_buffer("ranks", torch.arange(self.d_sae))  # the key in files; read as `frequency_rank`

    def select(self, x: Float[Tensor, "batch d_in"], info: StepInfo) -> SparseActs:
        weights: dict[str, Any] = {"W_enc": self.W_enc, "b_enc": self.b_enc, "center": self.pre_bias}
        share, feature_acts = self._share(info), None
        batch = info.ranks.global_batch_size(len(x))
        if share < 1 or info.step % RANK_EVERY == 0:
            feature_acts = encode_batch_topk(
                x, n_kept=self.config.k * batch, global_pairs=self.global_pairs(info), **weights
            )
            self.ranking.update(feature_acts, info.ranks)
            if info.step % RANK_EVERY == 0:
                self.frequency_rank.copy_(self.ranking.frequency_rank)
        if feature_acts is None or share > 0:
            given = (
                None
                if feature_acts is None
                else info.ranks.all_reduce_sum(torch.bincount(feature_acts.features, minlength=self.d_sae))
            )
            capacity = self.capacity(batch, share, given)
            wide = self._best(x, capacity if info.rules < 2 else capacity + 1, info)
            feature_acts = wide if info.rules < 2 else wide.where(keep_by_feature(wide, capacity, info.ranks))
            self.observe(self._borders(feature_acts, wide, capacity, info), info)
        else:
            self.observe(_smallest(feature_acts), info)
        return feature_acts

    def _best(self, x: Float[Tensor, "batch d_in"], capacity: Int[Tensor, " d_sae"], info: StepInfo) -> SparseActs:
        """Each feature's `capacity` largest pre-activations over the batch, those on this rank's rows."""
        at_most = capacity.clamp_max(len(x))
        feature_acts = encode_feature_topk(x, self.W_enc, self.b_enc, at_most, center=self.pre_bias)
        return (
            feature_acts
            if info.ranks.size == 1
            else feature_acts.where(keep_by_feature(feature_acts, capacity, info.ranks))
        )

    def _borders(
        self, feature_acts: SparseActs, wide: SparseActs, capacity: Int[Tensor, " d_sae"], info: StepInfo
    ) -> Float[Tensor, " d_sae"]:
        """For each feature, the midpoint of the smallest value kept and the largest one dropped.

        Using the smallest kept value itself would lose half a firing per feature and batch, as the threshold is strict. A feature
        with capacity to spare keeps every positive value; for it the smallest one is returned.
        """
        last = info.ranks.all_reduce_min(_smallest(feature_acts))
        if info.rules < 2:
            return last
        beyond = info.ranks.all_reduce_min(_smallest(wide))
        full = info.ranks.all_reduce_sum(torch.bincount(wide.features, minlength=self.d_sae)) > capacity
        return torch.where(full & last.isfinite(), (last + beyond) / 2, last)

    @property
    def frequency_rank(self) -> Int[Tensor, " d_sae"]:
        """Rank of each feature by firing frequency when last measured; 0 fires most."""
        return self.get_buffer("ranks")

    @property
    def zipf_law(self) -> tuple[float, float]:
        return 0.0 if self.config.budget == "uniform" else self.config.zipf_exponent, self.config.zipf_shift

    def capacity(
        self, batch: int, share: float = 1.0, given: Int[Tensor, " d_sae"] | None = None
    ) -> Int[Tensor, " d_sae"]:
        """How many tokens of a batch each feature keeps: interpolated by `share` from `given` to its own budget."""
        budget = zipf_capacity(self.d_sae, self.config.k * batch, batch, *self.zipf_law)
        of_rank = budget.to(self.frequency_rank.device)[self.frequency_rank]
        if given is None or share == 1:
            return of_rank
        return ((1 - share) * given + share * of_rank).round().long()

    def _share(self, info: StepInfo) -> float:
        """0 during the first half of a progressive run, 1 in its last quarter, linear between."""
        if not self.config.progressive:
            return 1.0
        return min(1.0, max(0.0, (info.step / max(info.n_steps, 1) - 0.5) / (PURE_FROM - 0.5)))


def _smallest(feature_acts: SparseActs) -> Float[Tensor, " d_sae"]:
    """The smallest activation of each feature in a batch; infinite where it has none."""
    none = feature_acts.values.new_full((feature_acts.d_sae,), torch.inf)
    return none.scatter_reduce(0, feature_acts.features, feature_acts.values.detach(), "amin")
