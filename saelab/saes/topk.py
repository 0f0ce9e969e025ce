"""TopK SAE (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3):

    z = ReLU(TopK(W_enc (x - b_dec) + b_enc)),   x_hat = W_dec z + b_dec,   L = FVU + auxk_alpha * AuxK

`multi_topk` adds 1/8 of the FVU with the 4 k largest (section 5.3.1), so that more than k may be kept at inference.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from saelab.kernels.decode import decode_error
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import total_variance
from saelab.saes.selection import SelectionConfig, SelectionSAE
from saelab.saes.step import Batch, Loss, StepInfo


@dataclass(frozen=True)
class TopKConfig(SelectionConfig):
    """A dictionary of `d_sae` features of which at most `k` fire per token."""

    multi_topk: bool = False
    """Add 1/8 of the FVU with the 4 k largest pre-activations to the loss."""


class TopKSAE(SelectionSAE):
    """Keeps the k largest pre-activations of each token."""

    variant = "topk"
    Config = TopKConfig
    config: TopKConfig
    selection_rule = "the k largest u of the token, where positive"

    @classmethod
    def peak_l0(cls, config: TopKConfig) -> float:
        return config.k * (5 if config.multi_topk else 1)

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return self._best(x, self.config.k)

    def _best(self, x: Tensor, k: int) -> SparseActs:
        return encode_topk(x, self.W_enc, self.b_enc, k, center=self.pre_bias)

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        loss = super().loss(batch, info)
        if not self.config.multi_topk:
            return loss
        x, target = self.normalized(batch)
        error, _ = decode_error(self._best(x, min(4 * self.config.k, self.d_sae)), self.W_dec, self.b_dec, target)
        more = error / total_variance(target, info.ranks)
        return loss._replace(total=loss.total + more / 8, terms=loss.terms | {"multi_topk": more})
