"""Reference implementation of `encode_topk`, its specification: dense pre-activations and one sort per row."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    score: str = "value",
    norms: Float[Tensor, " d_sae"] | None = None,
    center: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """Dense feature activations: the k largest positive scores of each row, ties to the lowest id."""
    pre_acts = (x if center is None else x - center) @ W_enc.T + b_enc
    scores = scores_of(pre_acts, score, norms)
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    mask = torch.zeros_like(pre_acts, dtype=torch.bool).scatter(1, kept, True)
    return torch.where(mask & (scores > 0), pre_acts, 0)


def scores_of(pre_acts: Tensor, score: str, norms: Tensor | None) -> Tensor:
    """The scores that pairs are ranked by; `score` is "value", "magnitude" or "decoder_norm"."""
    if score == "magnitude":
        return pre_acts.abs()
    return pre_acts if norms is None else pre_acts * norms
