"""Gates: at which tokens the edits of `lm.steer` apply, by what the activations hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.saes import SAE


@dataclass(frozen=True, eq=False)
class FeatureGate:
    """Open where a feature's activation exceeds a bound, made by `feature.above`."""

    hook_name: str
    sae: SAE
    feature: int
    bound: float
    """In raw feature-activation units; negative for a feature whose dominant end is."""
    sign: Literal[-1, 1] = 1
    asked: Mapping[str, Any] = field(default_factory=dict)
    units: Mapping[str, float] = field(default_factory=dict)
    """Those of the handle that built it."""

    @torch.no_grad()
    def is_open(self, x: Float[Tensor, "batch seq d_in"]) -> Bool[Tensor, "batch seq"]:
        """Of each token, by the SAE's own encode."""
        z = self.sae.encode(x.flatten(0, 1).to(self.sae.W_enc.device)).column(self.feature)
        return (self.sign * z > self.sign * self.bound).view(x.shape[:2]).to(x.device)


@dataclass(frozen=True, eq=False)
class DirectionGate:
    """Open where the component along a direction exceeds a bound, made by `direction.above`."""

    hook_name: str
    vector: Float[Tensor, " d_in"]
    bound: float
    """In the activation's units."""

    @torch.no_grad()
    def is_open(self, x: Float[Tensor, "batch seq d_in"]) -> Bool[Tensor, "batch seq"]:
        """Of each token."""
        vector = self.vector.to(x.device).double()
        return (x.double() @ (vector / vector.norm())) > self.bound
