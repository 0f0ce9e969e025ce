"""Counts, for each feature, the training tokens since it last fired (had a non-zero activation; being selected
is not enough), and decides after how many it is dead."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.distributed import SINGLE_PROCESS, Ranks
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import SAE
from saelab.training.config import TrainConfig

PERIODS = 400
TYPICAL_L0 = 32.0


class DeadFeatures:
    """`tokens_since_fired (d_sae)`, int64."""

    def __init__(self, d_sae: int, window: int, device: torch.device) -> None:
        self.window = window
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, feature_acts: SparseActs, ranks: Ranks = SINGLE_PROCESS) -> None:
        """Update with one batch, whose other rows are on other `ranks`."""
        fired = torch.zeros_like(self.tokens_since_fired, dtype=torch.bool).index_fill_(0, feature_acts.features, True)
        self.tokens_since_fired += ranks.global_batch_size(feature_acts.batch)
        self.tokens_since_fired.masked_fill_(ranks.all_reduce_any(fired), 0)

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Features that have not fired for `window` tokens or more."""
        return self.tokens_since_fired >= self.window


def dead_window(train: TrainConfig, variant: type[SAE], config: Any, rules: int) -> int:
    """Training tokens without firing after which a feature of this SAE counts as dead.

    With L0 of `d_sae` features firing per token, a feature fires once in `d_sae / L0` tokens on average. Frequencies have a
    long tail (Zipf), so the window is `PERIODS` times that: a feature a hundred times rarer than the average is silent for
    that long with probability exp(-4) = 2 %. (Gao et al. 2024 use 10 million tokens for all sizes.) It is capped at
    `train.longest_dead_window`, so that dead features can be revived during most of any run.
    """
    if train.dead_after_tokens is not None:
        return train.dead_after_tokens
    if rules < 2:
        return 50_000 if train.n_tokens < 10_000_000 else 10_000_000
    period = config.d_sae / (variant.expected_l0(config) or TYPICAL_L0)
    return max(1, min(round(PERIODS * period), train.longest_dead_window))
