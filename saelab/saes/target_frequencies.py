"""How often features should fire, and what moves their biases there (`gba.py`).

Features form groups of equal size whose target frequencies fall geometrically. From the fraction p of tokens on which a feature
fires and its largest pre-activation r on them, with s the mean r of those of its group that fire at all:

    its bias moves by -r where p is above the target, by +s where p is below a tenth of it, and else stays
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.distributed import Ranks
from saelab.kernels.sparse_acts import SparseActs

MOST = 0.5
"""The highest target: with a bias of 0 a feature fires on about half of the tokens."""
RARE = 0.1
"""Features that fire on less than this fraction of their target get a higher bias."""


def groups_of(d_sae: int, n_groups: int) -> Int[Tensor, " d_sae"]:
    """The group of each feature: consecutive ones of nearly equal size."""
    return torch.arange(d_sae) * n_groups // d_sae


def target_frequencies(
    groups: Int[Tensor, " d_sae"], ratio: float, total: float | None = None
) -> Float[Tensor, " d_sae"]:
    """The target of each feature, fp64: a geometric series over the groups, the first `ratio` times the last.

    They add up to `total`, which is at most half of `d_sae`, with none above 0.5; for None the first is 0.5.
    """
    weights = float(ratio) ** -(groups.double() / groups[-1].clamp_min(1))
    if total is None:
        return (MOST * weights).clamp_max(MOST)
    low, high = 0.0, MOST * ratio
    for _ in range(100):  # bisection for the factor at which the capped targets add up
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * weights).clamp_max(MOST).sum()) < total else (low, middle)
    return (high * weights).clamp_max(MOST)


class FiringCounts(nn.Module):
    """How often features fire, and how strongly, in the micro-batches of one step; empty between steps, so in no checkpoint."""

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.n_fired: Tensor
        self.largest: Tensor
        self.register_buffer("n_fired", torch.zeros(d_sae), persistent=False)
        self.register_buffer("largest", torch.zeros(d_sae), persistent=False)
        self.n_tokens = 0

    @torch.no_grad()
    def add(self, fired: SparseActs, ranks: Ranks) -> None:
        """Add the positive pre-activations of a micro-batch, whose other rows are on other `ranks`."""
        self.n_fired += ranks.all_reduce_sum(torch.bincount(fired.features, minlength=fired.d_sae))
        largest = self.largest.scatter_reduce(0, fired.features, fired.values.detach().to(self.largest), "amax")
        self.largest.copy_(-ranks.all_reduce_min(-largest))
        self.n_tokens += ranks.global_batch_size(fired.batch)

    def take(self) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
        """The frequencies, and the largest pre-activations (0 for those that did not fire); afterwards it is empty."""
        taken = self.n_fired / max(self.n_tokens, 1), self.largest.clone()
        self.n_fired.zero_()
        self.largest.zero_()
        self.n_tokens = 0
        return taken


def bias_moves(
    frequencies: Float[Tensor, " d_sae"],
    largest: Float[Tensor, " d_sae"],
    targets: Float[Tensor, " d_sae"],
    groups: Int[Tensor, " d_sae"],
) -> Float[Tensor, " d_sae"]:
    """What each bias moves by, before it is multiplied by a rate."""
    n_groups = int(groups[-1]) + 1
    n_fired = largest.new_zeros(n_groups).index_add(0, groups, (largest > 0).to(largest))
    sums = largest.new_zeros(n_groups).index_add(0, groups, largest)
    anywhere = sums.sum() / n_fired.sum().clamp_min(1)
    mean = torch.where(n_fired > 0, sums / n_fired.clamp_min(1), anywhere)
    rises = torch.where(frequencies < RARE * targets, mean[groups], 0)
    return torch.where(frequencies > targets, -largest, rises)
