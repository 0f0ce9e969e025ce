"""Reference implementation of `encode_batch_topk`: dense pre-activations and one sort over the batch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.reference.encode_topk import scores_of


def encode_batch_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    n_kept: int,
    score: str = "value",
    norms: Float[Tensor, " d_sae"] | None = None,
    center: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """Dense feature activations: the batch's `n_kept` largest positive scores, ties to the earlier row and lower id."""
    pre_acts = (x if center is None else x - center) @ W_enc.T + b_enc
    scores = scores_of(pre_acts, score, norms).flatten()
    kept = scores.sort(descending=True, stable=True).indices[:n_kept]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(0, kept, True)
    return torch.where((mask & (scores > 0)).view_as(pre_acts), pre_acts, 0)
