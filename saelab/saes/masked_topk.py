"""Masked TopK SAE (after Chidambaram et al. 2023, "Hiding data helps: on the benefits of masking for sparse coding", arXiv
2302.12715): TopK that has to predict coordinates it does not see, so that features of an over-complete dictionary cannot fit
the noise of a single token. In each step a random set H of the coordinates is hidden, and V are the others:

    z = ReLU(TopK(d_in / |V| W_enc[:, V] (x - b_dec)[V] + b_enc)),   x_hat = W_dec z + b_dec,
    L = |x - x_hat|^2 / |x - mean(x)|^2 over the coordinates H + auxk_alpha * AuxK, also from V to H

At inference it is a TopK SAE that sees everything. The paper encodes by orthogonal matching pursuit; the encoder, the factor d_in
/ |V| and AuxK are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.decode import decode
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import squared_error, total_variance
from saelab.saes.selection import SelectionConfig, SelectionSAE
from saelab.saes.step import Batch, Loss, StepInfo

_MASKS = 7 << 29
"""Added to the step, so that masks share no random numbers with weights or data."""


@dataclass(frozen=True)
class MaskedTopKConfig(SelectionConfig):
    """A dictionary of `d_sae` features of which at most `k` fire per token."""

    hidden_fraction: float = 0.25
    """Fraction of the coordinates that are hidden from the encoder in a training step, and that the loss is measured on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.hidden_fraction < 1:
            raise ValueError(
                f"hidden_fraction={self.hidden_fraction} must be between 0 and 1: some coordinates are hidden and some are "
                "not. To hide none use the variant topk."
            )


class MaskedTopKSAE(SelectionSAE):
    """TopK trained to predict hidden coordinates from the visible ones."""

    variant = "masked_topk"
    Config = MaskedTopKConfig
    config: MaskedTopKConfig
    exported_as = "topk"
    selection_rule = "the k largest u of the token, where positive"
    trains_in_model = False  # its loss reads a part of the coordinates

    def __init__(self, config: MaskedTopKConfig, d_in: int, seed: int = 0) -> None:
        if d_in < 2:
            raise ValueError(f"masked_topk needs at least 2 coordinates, one hidden and one not; got d_in={d_in}.")
        super().__init__(config, d_in, seed)

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return encode_topk(x, self.W_enc, self.b_enc, self.config.k, center=self.b_dec)

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        hidden, visible = (one.to(x.device) for one in masks(self.d_in, self.config.hidden_fraction, info.step))
        gain = self.d_in / len(visible)
        x, b_dec, W_enc = gain * x[:, visible], gain * self.b_dec[visible], self.W_enc[:, visible]
        feature_acts = encode_topk(x, W_enc, self.b_enc, self.config.k, center=b_dec)
        x_hat = decode(feature_acts, self.W_dec, self.b_dec)
        residual, unseen = (x_hat - target).detach(), target[:, hidden]
        terms = {"fvu_hidden": squared_error(unseen, x_hat[:, hidden]) / total_variance(unseen, info.ranks)}
        terms |= self.aux_of(x - b_dec, W_enc, self.W_dec[:, hidden], residual[:, hidden], feature_acts, info)
        aux = self.config.auxk_alpha * terms[self.config.aux] if self.config.aux in terms else 0.0
        return Loss(terms["fvu_hidden"] + aux, feature_acts, residual, target, terms)


def masks(d_in: int, hidden_fraction: float, step: int) -> tuple[Int[Tensor, " hidden"], Int[Tensor, " visible"]]:
    """The hidden and the visible coordinates of a step: the same on every rank, and again after an interruption."""
    order = torch.randperm(d_in, generator=torch.Generator().manual_seed(_MASKS + step))
    n_hidden = min(max(round(hidden_fraction * d_in), 1), d_in - 1)
    return order[:n_hidden].sort().values, order[n_hidden:].sort().values
