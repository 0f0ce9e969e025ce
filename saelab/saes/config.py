"""What all SAE configs share: bounds checks, the settings that identify a run, and input normalisation."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.saes.token_norm import TOKEN_NORMS
from saelab.validation import check_at_least, check_fields, check_integer

LATER = {"since": 2}
"""Metadata of config fields that the first version did not have (see `settings`)."""
_MIN_SQUARE = 1e-70  # keeps the scale finite in float32
TURNS_OFF = "; 0 turns it off"
"""What errors about weights of a loss end with."""
SHORT_RUN = 4_000_000
"""Runs of up to this many tokens count as short: they are likely to see rows several times."""
NORMALIZATIONS = ("center_and_scale", "scale", "none", *TOKEN_NORMS)


def normalization(
    kind: str, mean: Float[Tensor, "*sources d"], mean_square: float | Tensor
) -> tuple[Float[Tensor, "*sources d"], Float[Tensor, "*sources"]]:
    """Centre and scale (fp64) for data with this mean and mean squared norm; see `SAE.set_normalization`."""
    mean, mean_square = mean.double(), torch.as_tensor(mean_square, dtype=torch.float64)
    if kind not in ("center_and_scale", "scale"):
        return torch.zeros_like(mean), torch.ones_like(mean_square)
    if kind == "center_and_scale":
        mean_square = mean_square - mean.square().sum(-1)
    else:
        mean = torch.zeros_like(mean)
    return mean, (mean.shape[-1] / mean_square.clamp_min(_MIN_SQUARE)).sqrt()


def settings(config: Any) -> dict[str, Any]:
    """A config as recorded in the identity of a run. Fields added in later versions appear only if they are not at their
    default, since the files of older runs lack them."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    later = {field.name: field.default for field in dataclasses.fields(config) if "since" in field.metadata}
    return {name: value for name, value in values.items() if name not in later or value != later[name]}


def check_k(config: Any) -> None:
    """Check that `k` is a number of features that a config has. Raises `ValueError` with the value and the fix."""
    check_at_least(config, 1, "k")
    if config.k > config.d_sae:
        raise ValueError(f"k={config.k} must be between 1 and d_sae={config.d_sae}; lower k or raise d_sae.")


def check_config(config: Any) -> None:
    """Check the bounds that every config shares. Raises `ValueError` with the value and the fix."""
    check_integer("d_sae", config.d_sae, 1)
    check_fields(config)
    if config.normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize={config.normalize!r} must be one of {', '.join(NORMALIZATIONS)}.")
