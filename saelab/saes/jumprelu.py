"""JumpReLU SAE (Rajamanoharan et al. 2024, "Jumping Ahead", arXiv 2407.14435, eqs. 4, 9 and 11 to 13):

    z = u * H(u - theta),   u = W_enc x + b_enc,   theta = exp(log_threshold),   x_hat = W_dec z + b_dec,
    L = mean_t(|x - x_hat|^2 + lambda sum_i H(u_i - theta_i))

H has no gradient, so theta gets that of a rectangle of width `bandwidth` around it (`kernels/jump_relu.py`); u gets none from
the L0. With `loss="tanh"` it is Anthropic's form (Circuits updates, January 2025), whose sparsity term reaches all weights:

    L = mean_t(|x - x_hat|^2 + lambda sum_i tanh(c |z_i| |d_i|) + lambda_P sum_i max(theta_i - u_i, 0) |d_i|)

where the last term, which brings features back, is taken over dead features only (as SAELens does): so it costs nothing
when none is dead. |x|^2 is summed over dimensions, so lambda is the squared error that one more feature has to save.

Units: `theta` and `bandwidth` are lengths along u. Normalised inputs have root-mean-square norm sqrt(d_in), so u has a
spread of about 1 whatever d_in is; the paper's inputs have norm 1, so its 0.001 is 0.001 sqrt(d_in) here (0.024 at 576). Ours
is wider, for runs of hundreds of steps, and thresholds start near where they have to end: Adam moves log_threshold by no more
than the learning rate a step, which from the paper's 0.001 takes its hundreds of thousands of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.kernels.decode import decode_error
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.jump_relu import jump_relu
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.base import SAE, Batch, Loss, StepInfo, check_config
from saelab.saes.calibration import LOOSER_FACTORS, level_for
from saelab.saes.l0_controller import L0Controller, check_sparsity, quiet_level


@dataclass(frozen=True)
class JumpReLUConfig:
    """A dictionary of `d_sae` features, each with its own learned threshold."""

    d_sae: int
    """Number of features."""
    loss: Literal["l0", "tanh"] = "l0"
    """What counts features: "l0" (Rajamanoharan et al. 2024) or "tanh" (Anthropic, January 2025)."""
    sparsity_coefficient: float = 1.0
    """lambda, for inputs of root-mean-square norm sqrt(d_in) and squared error summed over dimensions."""
    sparsity_warmup: float = 0.05
    """Share of the run over which lambda rises from 0 (Anthropic's form: 1, the whole run)."""
    target_l0: float | None = None
    """Move lambda inside the run, from `sparsity_coefficient`, so that this many features fire on a token; None: leave it."""
    bandwidth: float = 0.1
    """Width of the window around a threshold in which its gradient sees pre-activations."""
    initial_threshold: float | None = None
    """theta of every feature at the start; None is where 8 times `target_l0` (else 32) features fire on normalised inputs."""
    pre_bias: bool = False
    """Take `b_dec` from the input before the encoder."""
    tanh_scale: float = 4.0
    """c of the "tanh" loss."""
    pre_act_coefficient: float = 3e-6
    """lambda_P of the "tanh" loss."""
    normalize: str = "center_and_scale"
    """Input normalisation: "center_and_scale", "scale" or "none"; stored with the SAE."""

    def __post_init__(self) -> None:
        check_config(self)
        check_sparsity(self, "sparsity")
        for name in ("bandwidth", "initial_threshold", "tanh_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive.")
        if not self.pre_act_coefficient >= 0:
            raise ValueError(f"pre_act_coefficient={self.pre_act_coefficient} must not be negative; 0 turns it off.")


class JumpReLUSAE(SAE):
    """Keeps pre-activations above the threshold of their feature."""

    variant = "jumprelu"
    Config = JumpReLUConfig
    config: JumpReLUConfig
    cpu_preset: ClassVar[dict[str, Any]] = {"target_l0": 32.0}
    rule = "u > exp(log_threshold)"
    base_lr = 3e-3

    def __init__(self, config: JumpReLUConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.unit_norm = config.loss == "l0"
        theta = config.initial_threshold or max(quiet_level(self.d_sae, config.target_l0 or 32.0), config.bandwidth)
        self.log_threshold = nn.Parameter(torch.full((self.d_sae,), math.log(theta)))
        self.sparsity = L0Controller(config.sparsity_coefficient, config.sparsity_warmup, config.target_l0)

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:
        """theta, always positive."""
        return self.log_threshold.exp()

    @property
    def pre_bias(self) -> Float[Tensor, " d_in"] | None:
        """What is taken from the input before the encoder; None: nothing."""
        return self.b_dec if self.config.pre_bias else None

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return encode_threshold(x, self.W_enc, self.b_enc, self.threshold.detach(), center=self.pre_bias)

    def calibrate(self, x: Float[Tensor, "n ..."]) -> bool:
        """With a `target_l0`: one factor on all thresholds."""
        if self.config.target_l0 is None:
            return False
        theta = self.threshold.detach()

        def ratios(rows: Tensor, factor: float) -> Tensor:
            acts = encode_threshold(self.normalize(rows), self.W_enc, self.b_enc, theta * factor, center=self.pre_bias)
            return acts.values / theta[acts.features]

        factor = level_for(self.config.target_l0, x, ratios, LOOSER_FACTORS)
        if factor is not None:
            self.log_threshold.data.add_(math.log(factor))
        return factor is not None

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        theta, bandwidth = self.threshold, self.config.bandwidth
        pre_acts = encode_threshold(x, self.W_enc, self.b_enc, theta, bandwidth / 2, self.pre_bias)
        acts, steps = jump_relu(pre_acts, theta, bandwidth)  # with zeros in the band, which carry theta's gradient
        error, residual = decode_error(acts, self.W_dec, self.b_dec, target)
        n = max(len(target), 1)
        fired = acts.where(acts.values != 0)
        terms = {"sse": error / n}
        if self.config.loss == "l0":
            terms["sparsity"] = steps.sum() / n
        else:
            norms = self.W_dec.norm(dim=1)[acts.features]
            terms["sparsity"] = (self.config.tanh_scale * acts.values * norms).tanh().sum() / n
        coefficient = self.sparsity(fired, info)
        total = terms["sse"] + coefficient * terms["sparsity"]
        if self.config.loss == "tanh" and self.config.pre_act_coefficient and bool(info.dead.any()):
            terms["pre_act"] = self._shortfall(x, theta, info.dead) / n
            total = total + self.config.pre_act_coefficient * terms["pre_act"]
        return Loss(total, fired, residual, target, terms | {"coefficient": coefficient})

    def _shortfall(self, x: Tensor, theta: Tensor, dead: Tensor) -> Float[Tensor, ""]:
        """By how much dead features stay under their thresholds, times their decoder norms, summed over the batch."""
        centered = x if self.pre_bias is None else x - self.pre_bias
        pre_acts = torch.addmm(self.b_enc[dead], centered, self.W_enc[dead].T)  # (batch, n_dead)
        return ((theta[dead] - pre_acts).relu() * self.W_dec[dead].norm(dim=1)).sum()
