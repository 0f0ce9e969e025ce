"""JumpReLU SAE (Rajamanoharan et al. 2024, "Jumping Ahead", arXiv 2407.14435, eqs. 4, 9 and 11 to 13):

    z = u * H(u - theta),   u = W_enc x + b_enc,   theta = exp(log_threshold),   x_hat = W_dec z + b_dec,
    L = mean_t(|x - x_hat|^2 + lambda sum_i H(u_i - theta_i))

H has no gradient, so theta gets a pseudo-gradient from a rectangular kernel of width `bandwidth` (`kernels/jump_relu.py`); u
gets none from the L0 term. `loss="tanh"` is Anthropic's form (Circuits updates, January 2025), whose sparsity term reaches
all weights:

    L = mean_t(|x - x_hat|^2 + lambda sum_i tanh(c |z_i| |d_i|) + lambda_P sum_i max(theta_i - u_i, 0) |d_i|)

where the last term, which revives features, covers dead features only (as in SAELens), so it costs nothing when none is
dead. With `loss="l0_target"` the sparsity term is `lambda d_in (L0 / target_l0 - 1)^2` of the batch's L0, which trains
thresholds as in "l0". |x|^2 is summed over dimensions, so lambda is the squared error that one more feature has to save.

Units: `theta` and `bandwidth` are in units of u. Normalised inputs have root-mean-square norm sqrt(d_in), so u has a standard
deviation of about 1 at any d_in; the paper's inputs have norm 1, so its 0.001 is 0.001 sqrt(d_in) here (0.024 at d_in 576).
Our default is wider, for runs of hundreds of steps, and thresholds start near their final values: Adam moves log_threshold by
at most the learning rate per step, which from the paper's 0.001 takes the hundreds of thousands of steps it trains for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.kernels.decode import decode_error
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.jump_relu import jump_relu
from saelab.kernels.precision import widened
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import auxk, total_variance
from saelab.saes.base import SAE
from saelab.saes.calibration import LOOSER_FACTORS, level_for
from saelab.saes.config import LATER, TURNS_OFF, check_config
from saelab.saes.l0_controller import L0Controller, check_sparsity, quiet_level, start_l0
from saelab.saes.step import Batch, Loss, StepInfo
from saelab.validation import check_at_least, check_positive

AUXK_ALPHA = 1 / 32

DEFAULT_L0 = 32.0
"""The L0 that initial thresholds assume if the config sets no `target_l0`."""


@dataclass(frozen=True)
class JumpReLUConfig:
    """A dictionary of `d_sae` features, each with its own learned threshold."""

    d_sae: int
    """Number of features."""
    loss: Literal["l0", "tanh", "l0_target"] = "l0"
    """Sparsity term: "l0" (Rajamanoharan et al. 2024), "tanh" (Anthropic, January 2025), or "l0_target", the squared relative
    deviation of L0 from `target_l0`."""
    sparsity_coefficient: float = 1.0
    """lambda, for inputs of root-mean-square norm sqrt(d_in) and squared error summed over dimensions."""
    sparsity_warmup: float = 0.05
    """Fraction of the run over which lambda rises from 0 (Anthropic's form: 1, the whole run)."""
    target_l0: float | None = None
    """Adapt lambda during the run, from `sparsity_coefficient`, until this many features fire per token; None keeps it fixed."""
    bandwidth: float = 0.1
    """Width of the window around a threshold in which pre-activations affect its gradient; same unit as `initial_threshold`."""
    ste_to_input: bool = field(default=False, metadata=LATER)
    """Pass the straight-through gradient of the window on to pre-activations too, and so to all weights, not just thresholds."""
    initial_threshold: float | None = None
    """Initial theta of every feature; None means where 8 times `target_l0` (32 if unset) features fire, at any `normalize`, or
    `bandwidth` if that is larger."""
    pre_bias: bool = False
    """Subtract `b_dec` from the input before the encoder."""
    tanh_scale: float = 4.0
    """c of the "tanh" loss."""
    revive: Literal["auto", "none", "pre_act", "auxk"] = field(default="auto", metadata=LATER)
    """How dead features are revived: "pre_act", the last term of the "tanh" loss, with any loss; "auxk", AuxK (Gao et al. 2024)
    at 1/32 of the variance; "auto" is "pre_act" with "tanh" and otherwise "none", as in the papers."""
    pre_act_coefficient: float = 3e-6
    """lambda_P of "pre_act"."""
    normalize: str = "center_and_scale"
    """Input normalisation: "center_and_scale", "scale" or "none"; stored with the SAE."""

    def __post_init__(self) -> None:
        check_config(self)
        check_sparsity(self, "sparsity")
        check_positive(self, "bandwidth", "initial_threshold", "tanh_scale")
        check_at_least(self, 0, "pre_act_coefficient", fix=TURNS_OFF)
        if self.loss == "l0_target" and self.target_l0 is None:
            raise ValueError(
                "loss='l0_target' needs target_l0: set it to the number of features that should fire per token."
            )

    @property
    def revival(self) -> str:
        """`revive` with "auto" resolved."""
        return self.revive if self.revive != "auto" else {"tanh": "pre_act"}.get(self.loss, "none")


class JumpReLUSAE(SAE):
    """Keeps pre-activations above the threshold of their feature."""

    variant = "jumprelu"
    Config = JumpReLUConfig
    config: JumpReLUConfig
    cpu_preset: ClassVar[dict[str, Any]] = {"target_l0": DEFAULT_L0}
    selection_rule = "u > exp(log_threshold)"
    base_lr = 3e-3

    def __init__(self, config: JumpReLUConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.unit_norm = config.loss != "tanh"
        self.unit = 1.0  # of the bandwidth
        theta = config.initial_threshold or max(
            quiet_level(self.d_sae, config.target_l0 or DEFAULT_L0), config.bandwidth
        )
        self.log_threshold = nn.Parameter(torch.full((self.d_sae,), math.log(theta)))
        moved_to = None if config.loss == "l0_target" else config.target_l0
        self.sparsity = L0Controller(config.sparsity_coefficient, config.sparsity_warmup, moved_to)

    @classmethod
    def expected_l0(cls, config: JumpReLUConfig) -> float | None:
        return config.target_l0

    @classmethod
    def peak_l0(cls, config: JumpReLUConfig) -> float:
        return start_l0(config.d_sae, config.target_l0 or DEFAULT_L0)

    @classmethod
    def has_dense_aux(cls, config: JumpReLUConfig) -> bool:
        return config.revival == "auxk"

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:
        """theta, always positive."""
        return widened(self.log_threshold)[0].exp()

    @property
    def pre_bias(self) -> Float[Tensor, " d_in"] | None:
        """The bias subtracted from the input before the encoder, or None."""
        return self.b_dec if self.config.pre_bias else None

    def start_at(self, x: Float[Tensor, " d_in"], y: Float[Tensor, " d_in"], spread: float) -> None:
        """A default threshold, and with it the bandwidth, scales with the spread of the data."""
        if spread and self.config.initial_threshold is None:
            self.unit = spread
            self.log_threshold.add_(math.log(spread))
        self.sparsity.rescale(spread**2)
        super().start_at(x, y, spread)

    def fold(self, norms: Float[Tensor, " d_sae"]) -> None:
        super().fold(norms)
        self.log_threshold.add_(norms.log())

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return encode_threshold(x, self.W_enc, self.b_enc, self.threshold.detach(), center=self.pre_bias)

    def calibrate(self, x: Float[Tensor, "n ..."]) -> bool:
        """With a `target_l0`: scale all thresholds by one factor."""
        if self.config.target_l0 is None:
            return False
        theta = self.threshold.detach()

        def ratios(rows: Tensor, factor: float) -> Tensor:
            feature_acts = encode_threshold(
                self.normalize(rows), self.W_enc, self.b_enc, theta * factor, center=self.pre_bias
            )
            return feature_acts.values / theta[feature_acts.features]

        factor = level_for(self.config.target_l0, x, ratios, LOOSER_FACTORS)
        if factor is not None:
            self.log_threshold.data.add_(math.log(factor))
        return factor is not None

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        theta, bandwidth = self.threshold, self.config.bandwidth * self.unit
        pre_acts = encode_threshold(x, self.W_enc, self.b_enc, theta, bandwidth / 2, self.pre_bias)
        # Includes zeros within the window, which carry theta's gradient.
        feature_acts, steps = jump_relu(pre_acts, theta, bandwidth, self.config.ste_to_input)
        error, residual = decode_error(feature_acts, self.W_dec, self.b_dec, self.sparse_target(x, target))
        n = max(len(target), 1)
        fired = feature_acts.where(feature_acts.values != 0)
        terms = {"sse": error / n, "sparsity": self._sparsity(feature_acts, steps, fired, info)}
        coefficient = self.sparsity(fired, info)
        total = terms["sse"] + coefficient * terms["sparsity"]
        if bool(info.dead.any()):
            weight, more = self._revival(x, target, residual, theta, info)
            terms |= more
            total = total + sum(weight * term for term in more.values())
        return Loss(total, fired, residual, target, terms | {"coefficient": coefficient})

    def _sparsity(
        self, feature_acts: SparseActs, steps: Tensor, fired: SparseActs, info: StepInfo
    ) -> Float[Tensor, ""]:
        """The sparsity term of the configured loss."""
        n, target = max(feature_acts.batch, 1), self.config.target_l0
        if self.config.loss == "tanh":
            norms = self.decoder_norms[feature_acts.features]
            return (self.config.tanh_scale * feature_acts.values * norms).tanh().sum() / n
        l0 = steps.sum() / n
        if self.config.loss == "l0" or target is None:
            return l0
        # The square is of the L0 of the whole batch; these rows are only a part of it.
        gap = (
            info.ranks.all_reduce_total(fired.nnz, l0.device)
            / max(info.ranks.global_batch_size(feature_acts.batch), 1)
            / target
            - 1
        )
        return self.d_in * (gap**2 + 2 * gap / target * (l0 - l0.detach()))

    def _revival(
        self, x: Tensor, target: Tensor, residual: Tensor, theta: Tensor, info: StepInfo
    ) -> tuple[float | Tensor, dict[str, Tensor]]:
        """Weight of the revival term, and the term under its name; empty if it is off."""
        kind, dead, n = self.config.revival, info.dead, max(len(target), 1)
        x = x if self.pre_bias is None else x - self.pre_bias
        if kind == "auxk":
            rows, k_aux = (self.W_enc[dead], self.b_enc[dead], self.W_dec[dead]), max(self.d_in // 2, 1)
            aux = auxk(x, -residual, *rows, k_aux, ranks=info.ranks)
            return AUXK_ALPHA * total_variance(target, info.ranks) / n, {"auxk": aux}
        if kind == "none" or not self.config.pre_act_coefficient:
            return 0.0, {}
        b_enc, x, W_enc = widened(self.b_enc[dead], x, self.W_enc[dead])
        shortfall = (theta[dead] - torch.addmm(b_enc, x, W_enc.T)).relu() * widened(self.W_dec[dead])[0].norm(dim=1)
        return self.config.pre_act_coefficient, {"pre_act": shortfall.sum() / n}
