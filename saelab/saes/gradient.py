"""Gradient SAE (g-SAE; Olmo et al. 2025, "Features that make a difference: leveraging gradients for improved dictionary
learning"): TopK that, in training, also ranks features by their effect on the language model's loss. With the gradient g of the
loss at the activation, zeroing feature i changes the loss by -z_i d_i . g, to first order.

    z = ReLU(W_enc (x - b_dec) + b_enc),   a_i = |d_i . g| / mean_j |d_j . g|
    keep the k features with the largest z_i (1 + beta a_i) ("add") or z_i a_i ("only"),   L as for TopK

What is stored and decoded is z. At inference there is no gradient: beta is 0, a TopK SAE. The authors' tables and code were not
available: the division by the mean (so that a is independent of the size of g), beta = 1 and mode "only" are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.encode_weighted_topk import encode_weighted_topk
from saelab.kernels.precision import widened
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.inputs import as_activations
from saelab.saes.selection import SelectionConfig, SelectionSAE
from saelab.saes.step import Batch, Loss, StepInfo
from saelab.saes.topk import TopKSAE, as_topk
from saelab.validation import check_at_least


@dataclass(frozen=True)
class GradientConfig(SelectionConfig):
    """A dictionary of `d_sae` features of which at most `k` fire per token."""

    beta: float = 1.0
    """Weight of a feature's effect on the loss in mode "add"; 0 is TopK."""
    mode: Literal["add", "only"] = "add"
    """Whether the effect on the loss adds to the feature activation in the ranking, or is ranked by alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "beta", fix="; 0 ranks by feature activations alone")


class GradientSAE(SelectionSAE):
    """TopK whose training selection is weighted by the gradient of the loss; without one it is TopK."""

    variant = "gradient"
    Config = GradientConfig
    config: GradientConfig
    needs_gradients: ClassVar[bool] = True
    selection_rule = "the k largest u of the token, where positive"
    trains_in_model = False  # its selection reads a cache's gradients

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return encode_topk(x, self.W_enc, self.b_enc, self.config.k, center=self.b_dec)

    def encode_with(self, x: Any, gradient: Any) -> SparseActs:
        """Feature activations of raw activations, selected as in training: with the gradient of the loss at them.

        Raises `ValueError` for a gradient of another shape, and for one that is NaN or infinite."""
        x, gradient = self.checked(self.normalize(x)), as_activations(gradient)
        if gradient.shape != x.shape or not bool(gradient.isfinite().all()):
            raise ValueError(
                f"The gradient must be finite and of the activations' shape, {tuple(x.shape)}; got {tuple(gradient.shape)}."
            )
        return self._weighted(x, gradient)

    def as_exported(self) -> TopKSAE:
        return as_topk(self)

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        if batch.gradient is None:
            return super().loss(batch, info)
        x, target = self.normalized(batch)
        return self.loss_of(x, target, self._weighted(x, batch.gradient), info)

    def _weighted(self, x: Tensor, gradient: Tensor) -> SparseActs:
        weights = self.weights_of(gradient)
        return encode_weighted_topk(x, self.W_enc, self.b_enc, self.config.k, weights, center=self.b_dec)

    @torch.no_grad()
    def weights_of(self, gradient: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Factors on z when features are ranked. The scale of the input, also that of a token, cancels in them; without any
        effect on the loss they are the same for all features."""
        (rows,) = widened(self.decoder()[0])
        gradient = gradient.to(rows)
        gradient = gradient / gradient.abs().amax(1, keepdim=True).clamp_min(
            torch.finfo(rows.dtype).tiny
        )  # no overflow
        effect = (gradient @ rows.T).abs_()
        mean = effect.mean(1, keepdim=True)
        effect = torch.where(mean > 0, effect / mean, 1.0)
        return effect if self.config.mode == "only" else effect.mul_(self.config.beta).add_(1)
