"""The sparsity coefficient of a loss: constant, or adapted during the run until the batch L0 reaches a target.

A PI controller with anti-windup. The setpoint moves, in log(L0), from the L0 of the first step to `target_l0` over the first
`RAMP_FRACTION` of the run, so that the error stays small; an L0 between setpoint and target counts as zero error. With e the
error of log(L0), clipped at `ERROR_CLIP`, and m its exponential moving average,

    log coefficient = I + PROPORTIONAL_GAIN * m,   I += INTEGRAL_GAIN * m,

where I stays within `INTEGRAL_LIMITS` times the start (anti-windup), and the integral gain is annealed to 0 over the last
`ANNEAL_FRACTION` of the run, so that L0 does not oscillate at its end. A run with a target also starts sparse
(`quiet_level`): with thousands of active features per token, the first steps would cost as much as all others together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.base import SAE
from saelab.saes.config import LATER, check_config
from saelab.saes.step import StepInfo
from saelab.validation import check_at_least

RAMP_FRACTION = 0.5
ANNEAL_FRACTION = 0.1
INTEGRAL_GAIN = 0.1
PROPORTIONAL_GAIN = 2.0
EMA_DECAY = 0.5
ERROR_CLIP = 1.0
MIN_L0 = 1e-3
START = 8.0
INTEGRAL_LIMITS = (0.1, 30.0)


class L0Controller(nn.Module):
    """`start` times a linear warm-up over the fraction `warmup` of the run; `target_l0` adapts it from `start`."""

    def __init__(self, start: float, warmup: float, target_l0: float | None) -> None:
        super().__init__()
        self.start, self.warmup, self.target_l0 = start, warmup, target_l0
        if target_l0 is None:
            return
        self.state: Tensor
        self.last_step: Tensor
        self.register_buffer("state", torch.tensor([math.log(start), 0.0, 0.0]))  # I, m, log L0 of the first step
        self.register_buffer("last_step", torch.tensor(-1))

    def forward(self, feature_acts: SparseActs, info: StepInfo) -> Float[Tensor, ""]:
        """The coefficient for a batch with these feature activations. All micro-batches of a step get the same value."""
        risen = min(1.0, (info.step + 1) / max(1.0, self.warmup * info.n_steps))
        if self.target_l0 is None:
            return feature_acts.values.new_tensor(self.start * risen)
        if int(self.last_step) != info.step:
            l0 = info.ranks.all_reduce_total(feature_acts.nnz, feature_acts.values.device) / max(
                info.ranks.global_batch_size(feature_acts.batch), 1
            )
            self._move(math.log(max(l0, MIN_L0)), math.log(self.target_l0), info)
        return risen * (self.state[0] + PROPORTIONAL_GAIN * self.state[1]).exp().to(feature_acts.values.dtype)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Before the first step, scale `start` so that it acts on this data as it would on normalised data.

        A fixed coefficient (no `target_l0`) is left as given."""
        if self.target_l0 is not None and factor > 0:
            self.start *= factor
            self.state[0] = math.log(self.start)

    @torch.no_grad()
    def _move(self, log_l0: float, target: float, info: StepInfo) -> None:
        if int(self.last_step) < 0:
            self.state[2] = log_l0
        left = max(0.0, 1 - info.step / (RAMP_FRACTION * info.n_steps))
        wanted = target + (self.state[2].item() - target) * left
        low, high = sorted((wanted, target))
        error = log_l0 - min(max(log_l0, low), high)
        error = min(max(error, -ERROR_CLIP), ERROR_CLIP)
        rate = INTEGRAL_GAIN * min(1.0, (info.n_steps - info.step) / (ANNEAL_FRACTION * info.n_steps))
        self.state[1] += (1 - EMA_DECAY) * (error - self.state[1])
        self.state[0] = (self.state[0] + rate * self.state[1]).clamp(
            *(math.log(self.start * by) for by in INTEGRAL_LIMITS)
        )
        self.last_step.fill_(info.step)


def start_l0(d_sae: int, target_l0: float | None) -> float:
    """Active features per token before training if it starts at `quiet_level`; without a target, half of all features."""
    return d_sae / 2 if target_l0 is None else min(d_sae / 2, START * target_l0)


def quiet_level(d_sae: int, l0: float) -> float:
    """The pre-activation that `START * l0` of `d_sae` features exceed on normalised inputs before training.

    With rows of norm 1 and inputs of root-mean-square norm sqrt(d_in), pre-activations are about normal with standard
    deviation 1. (Anthropic's January 2025 update sets initial biases in the same spirit.)
    """
    return NormalDist().inv_cdf(1 - start_l0(d_sae, l0) / d_sae)


def start_quiet(b_enc: Float[Tensor, " d_sae"], sparsity: L0Controller, spread: float) -> None:
    """For pre-activations with this `spread`, set biases and rescale L1 to start as sparse as on normalised data."""
    if sparsity.target_l0 is not None and spread:
        b_enc.fill_(-quiet_level(len(b_enc), sparsity.target_l0) * spread)
        sparsity.rescale(spread)


def check_sparsity(config: Any, kind: str) -> None:
    """Check `KIND_coefficient`, `KIND_warmup` and `target_l0` of a config. Raises `ValueError` with the value and the fix."""
    coefficient, warmup, target = (
        getattr(config, name) for name in (f"{kind}_coefficient", f"{kind}_warmup", "target_l0")
    )
    check_at_least(config, 0, f"{kind}_coefficient")
    if not 0 <= warmup <= 1:
        raise ValueError(f"{kind}_warmup={warmup} is a fraction of the run: use a value from 0 to 1.")
    if target is None:
        return
    if not 0 < target <= config.d_sae:
        raise ValueError(
            f"target_l0={target} must be more than 0 and at most d_sae={config.d_sae}; None sets no target."
        )
    if not coefficient:
        raise ValueError(
            f"{kind}_coefficient=0 cannot be adapted to reach target_l0={target}: use a positive initial value."
        )


@dataclass(frozen=True)
class L1Config:
    """A dictionary of `d_sae` features; an L1 penalty sets how many fire per token."""

    d_sae: int
    """Number of features."""
    l1_coefficient: float = 5.0
    """lambda, for inputs of root-mean-square norm sqrt(d_in) and squared error summed over dimensions."""
    l1_warmup: float = 0.05
    """Fraction of the run over which lambda rises from 0."""
    target_l0: float | None = None
    """Adapt lambda during the run, from `l1_coefficient`, so that this many features fire per token; None keeps it fixed."""
    normalize: str = "center_and_scale"
    """Input normalisation: "center_and_scale", "scale" or "none"; stored with the SAE."""
    resample_every: int | None = field(default=None, metadata=LATER)
    """Steps between resamplings, at most four, in which dead features start again from badly reconstructed rows; None: none."""

    def __post_init__(self) -> None:
        check_config(self)
        check_sparsity(self, "l1")
        check_at_least(self, 1, "resample_every")


class L1SAE(SAE):
    """What the variants with an `L1Config` promise."""

    extension_points = SAE.extension_points | {"restart"}
    competes = False

    @classmethod
    def expected_l0(cls, config: L1Config) -> float | None:
        return config.target_l0

    @classmethod
    def peak_l0(cls, config: L1Config) -> float:
        return start_l0(config.d_sae, config.target_l0)

    @torch.no_grad()
    def restart(
        self, features: Int[Tensor, " n"], directions: Float[Tensor, "n d_in"], length: Tensor
    ) -> list[nn.Parameter]:
        """Set the weights of these features anew: decoder rows `directions`, encoder rows `length` times these, biases 0
        (`training/resampling.py`). Returns the parameters that it changed."""
        self.W_dec[features] = directions
        self.W_enc[features] = length * directions
        self.b_enc[features] = 0
        return [self.W_dec, self.W_enc, self.b_enc]
