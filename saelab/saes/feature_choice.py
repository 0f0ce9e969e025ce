"""Feature Choice SAE (Ayonrinde 2024, arXiv 2411.02124): each feature keeps the m_i tokens of the batch where its
pre-activation is largest, so that no feature can die; the m_i add up to k B.

The budgets follow Zipf's law over the features' ranks (or are all equal). Progressive: the first half of the run is Mutual
Choice, then the budgets move from what that gives each feature to Zipf's, and the last quarter is Feature Choice alone
(the paper's formulas are not public; these are ours). At inference each feature has a threshold (`threshold.py`).
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
from saelab.saes.base import StepInfo
from saelab.saes.selection import SelectionConfig
from saelab.saes.threshold import ThresholdSAE
from saelab.saes.zipf import Density, zipf_places

RANK_EVERY = 100
PURE_FROM = 0.75


@dataclass(frozen=True)
class FeatureChoiceConfig(SelectionConfig):
    """A dictionary of `d_sae` features of which `k` fire on an average token, each on its own share of them."""

    aux: Literal["auxk", "aux_zipf"] = "aux_zipf"
    """Whom the aux loss serves: features that are dead, or also those that fire less than a tenth of what Zipf's law expects."""
    budget: Literal["zipf", "uniform"] = "zipf"
    """Places of each feature: by its rank under Zipf's law, or the same for all."""
    zipf_exponent: float = 1.0
    """Weight of rank r is 1 / (r + zipf_shift) ** zipf_exponent."""
    zipf_shift: float = 0.0
    """2.7 gives the Zipf-Mandelbrot law."""
    progressive: bool = True
    """Start as Mutual Choice; False is Feature Choice from the first step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zipf_exponent < 0 or self.zipf_shift < 0:
            raise ValueError(
                f"zipf_exponent={self.zipf_exponent} and zipf_shift={self.zipf_shift} must not be negative."
            )


class FeatureChoiceSAE(ThresholdSAE):
    """Keeps each feature's largest pre-activations over the batch."""

    variant = "feature_choice"
    Config = FeatureChoiceConfig
    config: FeatureChoiceConfig

    def __init__(self, config: FeatureChoiceConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed, threshold_shape=(config.d_sae,))
        self.ranking = Density(self.d_sae)
        self.ranks: Tensor
        self.register_buffer("ranks", torch.arange(self.d_sae))

    def select(self, x: Float[Tensor, "batch d_in"], info: StepInfo) -> SparseActs:
        weights: dict[str, Any] = {"W_enc": self.W_enc, "b_enc": self.b_enc, "center": self.pre_bias}
        share, acts = self._share(info), None
        batch = info.ranks.whole(len(x))
        if share < 1 or info.step % RANK_EVERY == 0:
            acts = encode_batch_topk(x, n_kept=self.config.k * batch, pool=self.pool(info), **weights)
            self.ranking.update(acts, info.ranks)
            if info.step % RANK_EVERY == 0:
                self.ranks.copy_(self.ranking.ranks)
        if acts is None or share > 0:
            given = None if acts is None else info.ranks.sum(torch.bincount(acts.features, minlength=self.d_sae))
            places = self.places(batch, share, given)
            wide = self._best(x, places if info.rules < 2 else places + 1, info)
            acts = wide if info.rules < 2 else wide.where(keep_by_feature(wide, places, info.ranks))
            self.observe(self._borders(acts, wide, places, info), info)
        else:
            self.observe(_smallest(acts), info)
        return acts

    def _best(self, x: Float[Tensor, "batch d_in"], places: Int[Tensor, " d_sae"], info: StepInfo) -> SparseActs:
        """Each feature's `places` largest pre-activations over the batch, as far as they are on this rank's rows."""
        at_most = places.clamp_max(len(x))
        acts = encode_feature_topk(x, self.W_enc, self.b_enc, at_most, center=self.pre_bias)
        return acts if info.ranks.size == 1 else acts.where(keep_by_feature(acts, places, info.ranks))

    def _borders(
        self, acts: SparseActs, wide: SparseActs, places: Int[Tensor, " d_sae"], info: StepInfo
    ) -> Float[Tensor, " d_sae"]:
        """Of each feature the midpoint of the last value kept and the first one left.

        The last one itself would keep half a firing too few of each feature and batch, as the threshold is strict. A feature
        that has places left keeps what is positive; its last value stays.
        """
        last = info.ranks.least(_smallest(acts))
        if info.rules < 2:
            return last
        beyond = info.ranks.least(_smallest(wide))
        full = info.ranks.sum(torch.bincount(wide.features, minlength=self.d_sae)) > places
        return torch.where(full & last.isfinite(), (last + beyond) / 2, last)

    @property
    def zipf_law(self) -> tuple[float, float]:
        return 0.0 if self.config.budget == "uniform" else self.config.zipf_exponent, self.config.zipf_shift

    def places(
        self, batch: int, share: float = 1.0, given: Int[Tensor, " d_sae"] | None = None
    ) -> Int[Tensor, " d_sae"]:
        """How many tokens of a batch each feature keeps: `share` of the way from what it was `given` to its own budget."""
        budget = zipf_places(self.d_sae, self.config.k * batch, batch, *self.zipf_law)
        own = budget.to(self.ranks.device)[self.ranks]
        if given is None or share == 1:
            return own
        return ((1 - share) * given + share * own).round().long()

    def _share(self, info: StepInfo) -> float:
        """0 during the first half of a progressive run, 1 in its last quarter, linear between."""
        if not self.config.progressive:
            return 1.0
        return min(1.0, max(0.0, (info.step / max(info.n_steps, 1) - 0.5) / (PURE_FROM - 0.5)))


def _smallest(acts: SparseActs) -> Float[Tensor, " d_sae"]:
    """The smallest code of each feature in a batch; infinite where it has none."""
    none = acts.values.new_full((acts.d_sae,), torch.inf)
    return none.scatter_reduce(0, acts.features, acts.values.detach(), "amin")
