"""ReLU SAE with L1 (Anthropic, "Circuits updates, April 2024"), the penalty weighted by decoder norms:

    z = ReLU(W_enc x + b_enc),   x_hat = W_dec z + b_dec,   L = mean_t(|x - x_hat|^2 + lambda sum_i z_i |d_i|)

No unit-norm constraint and no pre-bias; lambda rises linearly over the first part of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from saelab.kernels.decode import decode_error
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import weighted_l1
from saelab.saes.base import SAE, Batch, Loss, StepInfo, check_config


@dataclass(frozen=True)
class ReLUConfig:
    """A dictionary of `d_sae` features whose number per token is set by the L1 penalty."""

    d_sae: int
    """Number of features."""
    l1_coefficient: float = 5.0
    """lambda, for inputs of root-mean-square norm sqrt(d_in) and squared error summed over dimensions."""
    l1_warmup: float = 0.05
    """Share of the run over which lambda rises from 0."""
    normalize: str = "center_and_scale"
    """Input normalisation: "center_and_scale", "scale" or "none"; stored with the SAE."""

    def __post_init__(self) -> None:
        check_config(self)
        if self.l1_coefficient < 0:
            raise ValueError(f"l1_coefficient={self.l1_coefficient} must not be negative.")
        if not 0 <= self.l1_warmup <= 1:
            raise ValueError(f"l1_warmup={self.l1_warmup} is a share of the run: give 0 to 1.")


class ReLUSAE(SAE):
    """Keeps every positive pre-activation; sparsity comes from the loss."""

    variant = "relu"
    Config = ReLUConfig
    config: ReLUConfig
    unit_norm = False
    rule = "u > 0"
    base_lr = 1e-3

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return encode_threshold(x, self.W_enc, self.b_enc)

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        acts = self.encode_normalized(x)
        error, residual = decode_error(acts, self.W_dec, self.b_dec, target)
        norms = self.W_dec.norm(dim=1)[acts.features]
        reconstruction = error / max(len(target), 1)
        penalty = weighted_l1(acts.values, norms, acts.batch)
        risen = min(1.0, (info.step + 1) / max(1.0, self.config.l1_warmup * info.n_steps))
        total = reconstruction + self.config.l1_coefficient * risen * penalty
        return Loss(total, acts, residual, target, {"sse": reconstruction, "l1": penalty})
