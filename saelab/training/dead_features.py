"""Counts, for each feature, the training tokens since it last fired (fired: a non-zero code, never "was selected")."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.distributed import ALONE, Ranks
from saelab.kernels.sparse_acts import SparseActs


class DeadFeatures:
    """`tokens_since_fired (d_sae)`, int64."""

    def __init__(self, d_sae: int, window: int, device: torch.device) -> None:
        self.window = window
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, acts: SparseActs, ranks: Ranks = ALONE) -> None:
        """Take in one batch, of which `ranks` hold the other rows."""
        fired = torch.zeros_like(self.tokens_since_fired, dtype=torch.bool).index_fill_(0, acts.features, True)
        self.tokens_since_fired += ranks.whole(acts.batch)
        self.tokens_since_fired.masked_fill_(ranks.any(fired), 0)

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Silent for `window` tokens or more."""
        return self.tokens_since_fired >= self.window
