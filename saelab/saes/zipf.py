"""How often features fire, and how often Zipf's law predicts they fire (Ayonrinde 2024, arXiv 2411.02124). The paper does
not publish its formulas; here the feature of frequency rank r has weight `1 / (r + shift) ** exponent`."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saelab.distributed import SINGLE_PROCESS, Ranks
from saelab.kernels.sparse_acts import SparseActs

DECAY = 0.999
UNDER = 0.1


class Density(nn.Module):
    """Exponential moving average over steps of the fraction of tokens on which each feature fires.

    `mean (d_sae)` is corrected for the bias from starting at 0.
    """

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.average: Tensor
        self.steps: Tensor
        self.register_buffer("average", torch.zeros(d_sae))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, feature_acts: SparseActs, ranks: Ranks = SINGLE_PROCESS) -> None:
        """Update with the feature activations of one batch, whose other rows are on other `ranks`."""
        fired = ranks.all_reduce_sum(
            torch.bincount(feature_acts.features[feature_acts.values != 0], minlength=feature_acts.d_sae)
        )
        self.average.lerp_(fired.to(self.average) / max(ranks.global_batch_size(feature_acts.batch), 1), 1 - DECAY)
        self.steps += 1

    @property
    def mean(self) -> Float[Tensor, " d_sae"]:
        return self.average / (1 - DECAY ** self.steps.clamp_min(1))

    @property
    def frequency_rank(self) -> Int[Tensor, " d_sae"]:
        """0 for the feature that fires most; ties in order of id."""
        return frequency_rank(self.average)


def frequency_rank(density: Float[Tensor, " d_sae"]) -> Int[Tensor, " d_sae"]:
    """0 for the densest feature; ties in order of id."""
    order = density.sort(descending=True, stable=True).indices
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))


def zipf_capacity(
    d_sae: int, budget: int, cap: int, exponent: float = 1.0, shift: float = 0.0
) -> Int[Tensor, " d_sae"]:
    """Capacity of the feature at each frequency rank: from 1 to `cap`, non-increasing, `budget` in total.

    Raises `ValueError` if that is impossible: `budget` is below `d_sae` or above `d_sae * cap`.
    """
    if not d_sae <= budget <= d_sae * cap:
        raise ValueError(
            f"A budget of {budget} cannot give each of {d_sae} features 1 to {cap} tokens: raise batch_size or k, or lower d_sae."
        )
    weights = (torch.arange(1, d_sae + 1, dtype=torch.float64) + shift) ** -exponent
    low, high = 0.0, budget / float(weights[-1])  # bisection for the scale at which the clamped weights sum to `budget`
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * weights).clamp(1, cap).sum()) <= budget else (low, middle)
    share = (low * weights).clamp(1, cap)
    capacity = share.floor().long()
    left = budget - int(capacity.sum())
    fraction = torch.where(capacity < cap, share - capacity, -1.0)
    capacity[fraction.sort(descending=True, stable=True).indices[:left]] += 1
    return capacity


def underused(
    density: Float[Tensor, " d_sae"], budget: int, batch: int, exponent: float = 1.0, shift: float = 0.0
) -> Bool[Tensor, " d_sae"]:
    """Features that fire on less than a tenth of the tokens that Zipf's law predicts for their rank.

    `density` is an average over about 1,000 steps: a feature that died more recently is not included yet.
    """
    ranks = torch.arange(1, len(density) + 1, dtype=torch.float64, device=density.device)
    weights = (ranks + shift) ** -exponent
    expected = budget * weights / weights.sum() / max(batch, 1)
    return density < UNDER * expected.clamp_max(1)[frequency_rank(density)]
