"""GBA SAE (Chen et al. 2025, "Taming polysemanticity in LLMs: provable feature recovery via sparse autoencoders"): neither a
penalty nor a k; biases are moved until each feature fires about as often as its group should (`target_frequencies.py`).

    y = W_dec (x - b_dec) + b_enc,   z = a ReLU(y),   x_hat = W_dec^T z + b_dec,   L = FVU

Only W_dec (rows of norm 1, also the encoder) and the scales a have gradients. Every `adapt_every` steps the biases move by
`bias_rate` times what the pre-activations of the step's batch ask for, and stay in [-|x|, 0].

Ours, as we had the method from summaries: that a bias rises below a tenth of the target; that it rises by the mean over all
features where none of its group fired, as such a group could not recover otherwise; that `target_l0` sets the targets; the
first biases (right for normal pre-activations); |x| as the root-mean-square norm of centred inputs (the paper's biases are in
[-1, 0]); and a > 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.kernels.decode import decode_error
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import total_variance
from saelab.saes.base import SAE
from saelab.saes.config import check_config
from saelab.saes.relu import ReLUConfig, ReLUSAE
from saelab.saes.step import Batch, Loss, StepInfo
from saelab.saes.target_frequencies import MOST, FiringCounts, bias_moves, groups_of, target_frequencies
from saelab.validation import check_at_least

MIN_SCALE = 1e-3


@dataclass(frozen=True)
class GBAConfig:
    """A dictionary of `d_sae` features in groups, each with its own target frequency."""

    d_sae: int
    """Number of features."""
    target_l0: float | None = None
    """Sum of the target frequencies, at most half of `d_sae`. In the end fewer fire per token, as one may fire less often
    than its target. None: the first group's target is 0.5, as in the paper, and the sum about a tenth of `d_sae`."""
    n_groups: int = 10
    """Groups of equal size, from frequent (the first features) to rare."""
    frequency_ratio: float = 500.0
    """Target frequency of the first group over that of the last, in a geometric series; no target is above 0.5."""
    adapt_every: int = 50
    """Steps from one adaptation of the biases to the next."""
    bias_rate: float = 0.01
    """How far an adaptation moves a bias, as a fraction of the largest pre-activation."""
    normalize: str = "center_and_scale"
    """Input normalisation, stored with the SAE; with "constant_norm" all tokens have the same norm."""

    def __post_init__(self) -> None:
        check_config(self)
        check_at_least(self, 1, "n_groups", "adapt_every")
        check_at_least(self, 1, "frequency_ratio", fix=", the same target for all")
        if self.n_groups > self.d_sae:
            raise ValueError(f"n_groups={self.n_groups} must be at most d_sae={self.d_sae}; lower it.")
        if not 0 < self.bias_rate < 1:
            raise ValueError(f"bias_rate={self.bias_rate} must be between 0 and 1.")
        if self.target_l0 is not None and not 0 < self.target_l0 <= MOST * self.d_sae:
            raise ValueError(f"target_l0={self.target_l0} must be more than 0 and at most half of d_sae={self.d_sae}.")


class GBASAE(SAE):
    """Keeps every positive pre-activation; sparsity comes from biases that follow target frequencies."""

    variant = "gba"
    competes = False
    Config = GBAConfig
    config: GBAConfig
    tied = True
    selection_rule = "u > 0"
    cpu_preset: ClassVar[dict[str, Any]] = {"target_l0": 32.0}
    short_preset: ClassVar[dict[str, Any]] = {"adapt_every": 1}
    b_enc: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    b_dec: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    input_norm: Tensor
    groups: Tensor
    targets: Tensor

    @classmethod
    def peak_l0(cls, config: GBAConfig) -> float:
        return min(config.d_sae / 2, 4 * (config.target_l0 or MOST * config.d_sae / 4))

    def make_weights(self, rows: Float[Tensor, "d_sae d_in"]) -> None:
        self.W_dec, self.output_scale = nn.Parameter(rows), nn.Parameter(torch.ones(self.d_sae))
        groups = groups_of(self.d_sae, self.config.n_groups)
        targets = target_frequencies(groups, self.config.frequency_ratio, self.config.target_l0)
        norm = math.sqrt(self.d_in)  # of inputs with variance 1 per dimension, as pre-activations then have
        self.register_buffer("b_enc", torch.special.ndtri(targets).clamp(-norm, 0).float())
        self.register_buffer("b_dec", torch.zeros(self.d_in))
        self.register_buffer("input_norm", torch.tensor(norm))
        self.register_buffer("groups", groups, persistent=False)
        self.register_buffer("targets", targets.float(), persistent=False)
        self.counts = FiringCounts(self.d_sae)

    @property
    def W_enc(self) -> Float[Tensor, "d_sae d_in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The dictionary: an alias of `W_dec`."""
        return self.W_dec

    def start_at(self, x: Float[Tensor, " d_in"], y: Float[Tensor, " d_in"], spread: float) -> None:
        super().start_at(x, y, spread)
        self.b_enc.mul_(spread)
        self.input_norm.mul_(spread)

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return self._scaled(self._positive(x))

    def _positive(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return encode_threshold(x, self.W_dec, self.b_enc, center=self.b_dec)

    def _scaled(self, positive: SparseActs) -> SparseActs:
        return positive.with_values(positive.values * self.output_scale[positive.features])

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        positive = self._positive(x)
        if (info.step + 1) % self.config.adapt_every == 0:
            self.counts.add(positive, info.ranks)
        feature_acts = self._scaled(positive)
        error, residual = decode_error(feature_acts, self.W_dec, self.b_dec, self.sparse_target(x, target))
        fvu = error / total_variance(target, info.ranks)
        return Loss(fvu, feature_acts, residual, target, {"fvu": fvu})

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        self.output_scale.clamp_(min=MIN_SCALE)
        if self.counts.n_tokens:
            moves = bias_moves(*self.counts.take(), self.targets, self.groups)
            self.b_enc.copy_((self.b_enc + self.config.bias_rate * moves).clamp_max(0).maximum(-self.input_norm))

    def as_exported(self) -> ReLUSAE:
        """z = ReLU(a W_dec (x - b_dec) + a b_enc)."""
        sae = ReLUSAE(ReLUConfig(self.d_sae, pre_bias=True, normalize=self.config.normalize), self.d_in)
        scaled = {"W_enc": self.output_scale[:, None] * self.W_dec, "b_enc": self.output_scale * self.b_enc}
        kept = {name: value for name, value in self.state_dict().items() if name in sae.state_dict()}
        sae.to(self.W_dec.dtype).load_state_dict(kept | scaled)
        sae.provenance = self.provenance
        return sae
