"""The variance of a batch whose rows are spread over ranks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.distributed.collectives import Ranks


@torch.no_grad()
def global_variance(squares: Float[Tensor, ""], mean: Float[Tensor, " d"], n: int, ranks: Ranks) -> Float[Tensor, ""]:
    """`sum |x - mean(x)|^2` over all rows, from this rank's own sum about its own mean of `n` rows.

    Parts are merged as by Chan, Golub & LeVeque (1983): nothing is subtracted that is nearly equal.
    """
    local = torch.cat([squares.view(1), squares.new_tensor([float(n)]), mean])
    gathered = torch.stack(ranks.all_gather(local[None])).squeeze(1)  # (ranks, d + 2)
    counts, means = gathered[:, 1], gathered[:, 2:]
    mean = (counts[:, None] * means).sum(0) / counts.sum()
    return gathered[:, 0].sum() + (counts * (means - mean).square().sum(1)).sum()
