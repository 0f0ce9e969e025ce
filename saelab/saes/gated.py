"""Gated SAE (Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders", arXiv 2404.16014,
section 3.2): whether a feature fires and how strongly are computed separately, so that the gate's L1 does not shrink magnitudes:

    pi_gate = W_enc (x - b_dec) + b_gate,   pi_mag = exp(r_mag) * (W_enc (x - b_dec)) + b_mag,
    z = H(pi_gate) * ReLU(pi_mag),   x_hat = W_dec z + b_dec,
    L = mean_t(|x - x_hat|^2 + lambda |ReLU(pi_gate)|_1 + |x - x_hat_frozen|^2)

where `x_hat_frozen` decodes ReLU(pi_gate) with W_dec and b_dec detached: this term trains the gate but not the decoder.
`b_enc` is b_gate. The gate finds the active pairs; magnitudes follow from the gate values:
`pi_mag = exp(r_mag) pi_gate + (b_mag - exp(r_mag) b_gate)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.kernels.decode import decode_error
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.precision import widened
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.config import LATER
from saelab.saes.l0_controller import L1SAE, L0Controller, L1Config, quiet_level, start_quiet
from saelab.saes.step import Batch, Loss, StepInfo


@dataclass(frozen=True)
class GatedConfig(L1Config):
    """A dictionary of `d_sae` features; an L1 penalty on their gates sets how many fire per token."""

    pre_bias: bool = field(default=True, metadata=LATER)
    """Subtract `b_dec` from the input before the encoder."""


class GatedSAE(L1SAE):
    """A gate selects the features of a token; magnitudes share its weights."""

    variant = "gated"
    Config = GatedConfig
    config: GatedConfig
    cpu_preset: ClassVar[dict[str, Any]] = {"target_l0": 32.0}
    selection_rule = "u > 0 and exp(r_mag) u + b_mag - exp(r_mag) b_enc > 0, which is the code"
    base_lr = 1e-3

    def __init__(self, config: GatedConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.r_mag, self.b_mag = nn.Parameter(torch.zeros(self.d_sae)), nn.Parameter(torch.zeros(self.d_sae))
        self.sparsity = L0Controller(config.l1_coefficient, config.l1_warmup, config.target_l0)
        if config.target_l0 is not None and config.normalize != "none":
            self.b_enc.data.fill_(-quiet_level(self.d_sae, config.target_l0))

    def start_at(self, x: Float[Tensor, " d_in"], y: Float[Tensor, " d_in"], spread: float) -> None:
        start_quiet(self.b_enc, self.sparsity, spread)
        super().start_at(x, y, spread)

    @property
    def pre_bias(self) -> Float[Tensor, " d_in"] | None:
        return self.b_dec if self.config.pre_bias else None

    @property
    def b_gate(self) -> Float[Tensor, " d_sae"]:
        """The bias of the gate: an alias of `b_enc`."""
        return self.b_enc

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return self._magnitudes(self._gates(x))

    def _gates(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        """pi_gate where it is positive."""
        return encode_threshold(x, self.W_enc, self.b_enc, center=self.pre_bias)

    def _magnitudes(self, gates: SparseActs) -> SparseActs:
        """pi_mag at open gates, where it is positive."""
        r_mag, b_mag, b_gate = widened(self.r_mag, self.b_mag, self.b_gate)
        gain = r_mag.exp()
        shift = b_mag - gain * b_gate
        pi_mag = gain[gates.features] * gates.values + shift[gates.features]
        return gates.with_values(pi_mag).where(pi_mag > 0)

    @torch.no_grad()
    def restart(
        self, features: Int[Tensor, " n"], directions: Float[Tensor, "n d_in"], length: Tensor
    ) -> list[nn.Parameter]:
        for of_magnitudes in (self.r_mag, self.b_mag):
            of_magnitudes[features] = 0
        return [*super().restart(features, directions, length), self.r_mag, self.b_mag]

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        gates = self._gates(x)
        feature_acts = self._magnitudes(gates)
        error, residual = decode_error(feature_acts, self.W_dec, self.b_dec, target)
        frozen, _ = decode_error(gates, self.W_dec.detach(), self.b_dec.detach(), target)
        n = max(len(target), 1)
        terms = {"sse": error / n, "aux": frozen / n, "l1": gates.values.sum() / n}
        coefficient = self.sparsity(feature_acts, info)
        total = terms["sse"] + terms["aux"] + coefficient * terms["l1"]
        return Loss(total, feature_acts, residual, target, terms | {"coefficient": coefficient})
