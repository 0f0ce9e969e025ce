"""AbsTopK SAE (Zhu et al., ICLR 2026): keeps the k pre-activations of largest magnitude with their
signs, so that one feature can represent both directions of an axis:

    S = indices of the k largest |u|,   u = W_enc x + b_enc,   z_i = u_i for i in S, else 0,   x_hat = W_dec z + b_dec

The loss is that of TopK (the authors' code is not public); AuxK ranks dead features by magnitude and applies no ReLU.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.selection import SelectionConfig, SelectionSAE


@dataclass(frozen=True)
class AbsTopKConfig(SelectionConfig):
    """A dictionary of `d_sae` signed features of which `k` fire per token."""

    subtract_b_dec: bool = False
    """Subtract `b_dec` from the input before the encoder, as TopK does."""


class AbsTopKSAE(SelectionSAE):
    """Keeps each token's k pre-activations of largest magnitude."""

    variant = "abs_topk"
    Config = AbsTopKConfig
    config: AbsTopKConfig
    signed = True
    selection_rule = "the k largest |u| of the token, signs kept"

    @property
    def pre_bias(self) -> Float[Tensor, " d_in"] | None:
        return self.b_dec if self.config.subtract_b_dec else None

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return encode_topk(x, self.W_enc, self.b_enc, self.config.k, "magnitude", center=self.pre_bias)
