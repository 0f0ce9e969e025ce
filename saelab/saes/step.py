"""What an SAE is given in a training step, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from saelab.distributed import SINGLE_PROCESS, Ranks
from saelab.kernels.sparse_acts import SparseActs

RULES = 4
"""Number of the training rules in force. A change that gives a run other bits raises it, and old runs keep the old rules."""


class SAEOutput(NamedTuple):
    """What `sae(x)` returns."""

    x_hat: Tensor
    """(batch, d_in) reconstruction in the units of `x`."""
    acts: SparseActs
    """The feature activations it was decoded from."""


class Batch(NamedTuple):
    """Raw activations of a training step: `y` is `x` unless the SAE predicts another hook."""

    x: Tensor
    y: Tensor


class StepInfo(NamedTuple):
    """What a loss may know about the run."""

    dead: Bool[Tensor, " d_sae"]
    """Features silent for longer than `TrainConfig.dead_after_tokens`."""
    step: int
    n_steps: int
    ranks: Ranks = SINGLE_PROCESS
    """The processes that share the batch, for what is a function of all its rows."""
    rules: int = RULES
    """The training rules of the run; less than `RULES` where an earlier saelab began it (`training/rules.py`)."""


class Loss(NamedTuple):
    """What `sae.loss` returns."""

    total: Tensor
    feature_acts: SparseActs
    residual: Float[Tensor, "batch d_in"]
    """Reconstruction minus `y`, in the units of the weights; detached."""
    y: Float[Tensor, "batch d_in"]
    """The target, in the same units."""
    terms: dict[str, Tensor]
    """Terms of the total by name, for the log."""
