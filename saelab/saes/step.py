"""What an SAE receives in a training step, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from saelab.distributed import SINGLE_PROCESS, Ranks
from saelab.kernels.sparse_acts import SparseActs

RULES = 6
"""Version of the training rules. A change that alters the bits of a run increments it; runs already started keep theirs."""


class SAEOutput(NamedTuple):
    """What `sae(x)` returns."""

    x_hat: Tensor
    """(batch, d_in) reconstruction in the units of `x`."""
    acts: SparseActs
    """The feature activations it was decoded from."""


class Batch(NamedTuple):
    """Raw activations of a training step: `y` is `x` unless the SAE predicts another hook or compares two views."""

    x: Tensor
    y: Tensor
    gradient: Tensor | None = None
    """That of the language model's loss with respect to each row of `x`, for variants that read it."""
    labels: Tensor | None = None
    """Which token each row is, `(batch, 2)` (`atoms.py`); only for variants with `needs_labels`."""


class StepInfo(NamedTuple):
    """Information about the run that `loss` receives."""

    dead: Bool[Tensor, " d_sae"]
    """Features that have not fired for `TrainConfig.dead_after_tokens` tokens."""
    step: int
    n_steps: int
    ranks: Ranks = SINGLE_PROCESS
    """The ranks that share the batch, for quantities that depend on all its rows."""
    rules: int = RULES
    """The training rules of the run; lower than `RULES` if an earlier saelab started it (`training/rules.py`)."""


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
