"""Steering with a plain vector: add it to the activations, or project its direction out of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.edits.decomposition import FeatureShare, as_features
from saelab.edits.feature_edit import finite
from saelab.saes import SAE


@dataclass(frozen=True, eq=False)
class VectorEdit:
    """An edit for `lm.steer`. `raw` adds `strength * vector`; `resid_norm` adds, at every token, the unit vector times
    `strength` times the norm of the activation; `ablate` projects the vector's direction out.

    Position 0 (the attention sink) and padding are not edited.
    """

    hook_name: str
    vector: Float[Tensor, " d_in"]
    mode: Literal["raw", "resid_norm", "ablate"]
    strength: float = 1.0

    @property
    def d_in(self) -> int:
        """Width of the activations it edits."""
        return self.vector.numel()

    @torch.no_grad()
    def apply(
        self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq d_in"]:
        """The edited activations, in the dtype of `x`, computed in fp32."""
        if self.mode != "ablate" and self.strength == 0:
            return x
        vector, wide = self.vector.to(x.device), x.float()
        unit = (vector.double() / vector.double().norm()).float()  # its square may overflow or underflow fp32
        if self.mode == "raw":
            change = self.strength * vector.expand_as(wide)
        elif self.mode == "resid_norm":
            change = self.strength * wide.double().norm(dim=-1, keepdim=True).float() * unit
        else:
            change = -(wide @ unit)[..., None] * unit
        return torch.where((positions > 0)[..., None], (wide + change).to(x.dtype), x)


class Direction:
    """A vector `(d_in,)` at a hook. Raises `ValueError` unless it is a single finite, non-zero vector."""

    def __init__(self, vector: Tensor, hook_name: str):
        vector = torch.as_tensor(vector).detach().float()
        if vector.ndim != 1 or not bool(vector.isfinite().all()) or not bool(vector.any()):
            raise ValueError(f"Direction got {tuple(vector.shape)}; expected one finite, non-zero vector (d_in,).")
        self.vector, self.hook_name = vector, hook_name

    def __repr__(self) -> str:
        return f"Direction(d_in {self.vector.numel()}, norm {self.vector.norm():.3g}, at {self.hook_name})"

    def __mul__(self, strength: float) -> VectorEdit:
        """An edit that adds `strength` times the vector."""
        return self.add(strength)

    __rmul__ = __mul__

    def add(self, value: float, unit: str = "raw") -> VectorEdit:
        """An edit that adds `value` times the vector, or with `unit="resid_norm"` the unit vector times `value` times each
        activation's norm. Raises `ValueError` for an unknown unit or a value that is not finite."""
        if unit not in ("raw", "resid_norm"):
            raise ValueError(f"unit={unit!r} is unknown; expected 'raw' or 'resid_norm'.")
        return VectorEdit(self.hook_name, self.vector, unit, finite(value))

    def ablate(self) -> VectorEdit:
        """An edit that projects the direction out: edited activations have no component along it."""
        return VectorEdit(self.hook_name, self.vector, "ablate")

    def as_features(self, sae: SAE, k: int = 10) -> list[FeatureShare]:
        """The features that make it up: see `saelab.edits.decomposition.as_features`."""
        return as_features(self.vector, sae, k, self.hook_name)
