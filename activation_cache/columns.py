"""The columns of a cache: the activations of each hook and, if it was harvested with gradients, the gradient at each hook.

The gradient is that of `LOSS` with respect to the activation: row i of "HOOK.gradient" belongs to row i of "HOOK".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.tokens import TokenBatch

LOSS = "sum of the next-token cross-entropy of the context"
"""In nats, of the unedited model, summed over the tokens: the gradient includes the effect on all later tokens."""
_SUFFIX = ".gradient"


def gradient_of(hook_name: str) -> str:
    """Name of the column that holds the gradient at a hook."""
    return f"{hook_name}{_SUFFIX}"


def is_gradient(column: str) -> bool:
    """Whether a column holds gradients."""
    return column.endswith(_SUFFIX)


def gradients_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Width of each gradient column of a cache with this config; {} if it has none."""
    return {gradient_of(hook): width for hook, width in config["hooks"].items()} if "gradients" in config else {}


def columns_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Width of each column of a cache with this config."""
    return {**config["hooks"], **gradients_of(config)}


def has_loss(batch: TokenBatch) -> Bool[Tensor, "n ctx"]:
    """The tokens that another follows in their context: at any other no loss is affected, and the gradient is 0."""
    real = batch.doc >= 0
    return real & torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], dim=1)
