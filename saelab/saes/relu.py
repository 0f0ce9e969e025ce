"""ReLU SAE with L1 (Anthropic, "Circuits updates, April 2024"), the penalty weighted by decoder norms:

    z = ReLU(W_enc x + b_enc),   x_hat = W_dec z + b_dec,   L = mean_t(|x - x_hat|^2 + lambda sum_i z_i |d_i|)

No unit-norm constraint, no pre-bias by default; lambda rises linearly over the first part of the run, and may be adapted to
reach a target L0 (`l0_controller.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from saelab.kernels.decode import decode_error
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import weighted_l1
from saelab.saes.config import LATER
from saelab.saes.l0_controller import L1SAE, L0Controller, L1Config, quiet_level, start_quiet
from saelab.saes.step import Batch, Loss, StepInfo


@dataclass(frozen=True)
class ReLUConfig(L1Config):
    """A dictionary of `d_sae` features; the L1 penalty sets how many fire per token."""

    pre_bias: bool = field(default=False, metadata=LATER)
    """Subtract `b_dec` from the input before the encoder, as Bricken et al. 2023 did."""


class ReLUSAE(L1SAE):
    """Keeps every positive pre-activation; sparsity comes from the loss."""

    variant = "relu"
    Config = ReLUConfig
    config: ReLUConfig
    unit_norm = False
    cpu_preset: ClassVar[dict[str, Any]] = {"target_l0": 32.0}
    selection_rule = "u > 0"
    base_lr = 1e-3

    def __init__(self, config: ReLUConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.sparsity = L0Controller(config.l1_coefficient, config.l1_warmup, config.target_l0)
        if config.target_l0 is not None and config.normalize != "none":
            self.b_enc.data.fill_(-quiet_level(self.d_sae, config.target_l0))

    @property
    def pre_bias(self) -> Float[Tensor, " d_in"] | None:
        return self.b_dec if self.config.pre_bias else None

    def start_at(self, x: Float[Tensor, " d_in"], y: Float[Tensor, " d_in"], spread: float) -> None:
        start_quiet(self.b_enc, self.sparsity, spread)
        super().start_at(x, y, spread)

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return encode_threshold(x, self.W_enc, self.b_enc, center=self.pre_bias)

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        feature_acts = self.encode_normalized(x)
        error, residual = decode_error(feature_acts, self.W_dec, self.b_dec, self.sparse_target(x, target))
        norms = self.decoder_norms[feature_acts.features]
        terms = {"sse": error / max(len(target), 1), "l1": weighted_l1(feature_acts.values, norms, feature_acts.batch)}
        coefficient = self.sparsity(feature_acts, info)
        total = terms["sse"] + coefficient * terms["l1"]
        return Loss(total, feature_acts, residual, target, terms | {"coefficient": coefficient})
