"""Checks that features fire in the first and the last step: an SAE in which nothing fires has no gradient and learns nothing."""

from __future__ import annotations

import logging
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import TrainingError
from saelab.saes import SAE, JumpReLUConfig
from saelab.saes.calibration import ROWS_AT_ONCE
from saelab.saes.threshold import ThresholdSAE

_LOG = logging.getLogger("saelab")
MIN_L0 = 0.01


def check_start(sae: SAE, l0: float) -> None:
    """Raises `TrainingError`, saying what to change, if `l0`, features per token of the first batch, is close to 0."""
    config = sae.config
    if l0 >= MIN_L0 * min(1.0, sae.expected_l0(config) or 1.0):
        return
    if isinstance(config, JumpReLUConfig) and config.initial_threshold is not None:
        fix = (
            f"initial_threshold={config.initial_threshold} is above nearly all pre-activations of the first batch: lower "
            "it, or leave it at None, which derives it from the spread of the data"
        )
    else:
        fix = (
            f"the rows of the first batch hardly differ from their mean after normalize={config.normalize!r}: check the "
            "data, or use normalize='center_and_scale'"
        )
    raise TrainingError(f"Nothing fires at the start ({l0:.2g} features per token), so nothing can be learned: {fix}.")


@torch.no_grad()
def check_promise(sae: SAE, x: Float[Tensor, "n ..."]) -> None:
    """Log a warning if the L0 on raw rows `x` is more than 5 % off what the config promises."""
    promised = sae.expected_l0(sae.config)
    if promised is None or not len(x):
        return
    l0 = sum(sae.encode_normalized(sae.normalize(rows)).nnz for rows in x.split(ROWS_AT_ONCE)) / len(x)
    if abs(l0 / promised - 1) > 0.05:
        learned = any(weights.requires_grad for weights in sae.parameters())
        fix = "Train longer, or change the L0." if learned else "Lower tau, which gives it more atoms, or change k."
        _LOG.warning(
            f"{sae.variant}: {l0:.2f} features fire per token on {len(x):,} rows after training; the config asks for "
            f"{promised:g}. {fix}"
        )


def check_end(sae: SAE, l0: float) -> None:
    """If nothing fires at the end, warns, or raises `TrainingError` for an SAE left without a threshold."""
    if l0 > 0:
        return
    said = (
        "Nothing fires at the end of training: every feature died. Use normalize='center_and_scale' "
        f"(it is {sae.config.normalize!r}), lower lr, or ask for less sparsity."
    )
    if isinstance(sae, ThresholdSAE) and not bool(sae.n_observed.any()):
        raise TrainingError(said)
    warnings.warn(said, stacklevel=2)
