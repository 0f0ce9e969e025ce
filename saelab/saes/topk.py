"""TopK SAE (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3):

z = ReLU(TopK(W_enc (x - b_dec) + b_enc)),   x_hat = W_dec z + b_dec,   L = FVU + auxk_alpha * AuxK
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from saelab.arguments import check_integer
from saelab.kernels.decode import decode_error
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import auxk, total_variance
from saelab.saes.base import SAE, Batch, Loss, StepInfo, check_config


@dataclass(frozen=True)
class TopKConfig:
    """A dictionary of `d_sae` features of which at most `k` fire on a token."""

    d_sae: int
    """Number of features."""
    k: int = 32
    """Features kept per token (L0)."""
    auxk_alpha: float = 1 / 32
    """Weight of the AuxK loss that revives dead features (Gao et al., Appendix A.2)."""
    k_aux: int | None = None
    """Dead features used per token by AuxK; None is d_in // 2."""
    normalize: str = "center_and_scale"
    """Input normalisation: "center_and_scale", "scale" or "none"; stored with the SAE."""

    def __post_init__(self) -> None:
        check_config(self)
        check_integer("k", self.k, 1)
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} must be between 1 and d_sae={self.d_sae}; lower k or raise d_sae.")
        if self.k_aux is not None:
            check_integer("k_aux", self.k_aux, 1)
        if not self.auxk_alpha >= 0:
            raise ValueError(f"auxk_alpha={self.auxk_alpha} must not be negative or NaN; 0 turns AuxK off.")


class TopKSAE(SAE):
    """Keeps the k largest pre-activations of each token."""

    variant = "topk"
    Config = TopKConfig
    config: TopKConfig

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return encode_topk(x, self.W_enc, self.b_enc, self.config.k, center=self.b_dec)

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x = self.normalize(batch.x)
        target = x if batch.y is batch.x else self.normalize(batch.y)
        acts = self.encode_normalized(x)
        error, residual = decode_error(acts, self.W_dec, self.b_dec, target)
        reconstruction = error / total_variance(target)
        terms = {"fvu": reconstruction}
        if self.config.auxk_alpha and bool(info.dead.any()):
            dead = info.dead.nonzero().squeeze(1)
            terms["auxk"] = auxk(
                x - self.b_dec,
                -residual,
                self.W_enc[dead],
                self.b_enc[dead],
                self.W_dec[dead],
                self.config.k_aux or max(self.d_in // 2, 1),
            )
        total = reconstruction + self.config.auxk_alpha * terms["auxk"] if "auxk" in terms else reconstruction
        return Loss(total, acts, residual, target, terms)
