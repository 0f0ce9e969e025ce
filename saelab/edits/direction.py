"""Steering with a plain vector: add it to the activations, or project its direction out of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.edits.decomposition import FeatureShare, as_features
from saelab.edits.gate import DirectionGate
from saelab.saes import SAE


class Range(NamedTuple):
    """Bounds of a value, infinite where there is none."""

    low: float
    high: float


OPEN = Range(-math.inf, math.inf)


@dataclass(frozen=True, eq=False)
class VectorEdit:
    """An edit for `lm.steer`. `raw` adds `strength * vector`; `resid_norm` adds, at every token, the unit vector times
    `strength` times the norm of the activation; `ablate` projects the vector's direction out. `scale`, `clamp` and `cap` change
    the activation's component along the direction.

    Position 0 (the attention sink) and padding are not edited.
    """

    hook_name: str
    vector: Float[Tensor, " d_in"]
    mode: Literal["raw", "resid_norm", "ablate", "scale", "clamp", "cap"]
    strength: float = 1.0
    bounds: Range = OPEN
    """What "cap" keeps the component in."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """Where a feature made it: how it was asked for, in the words of `FeatureHandle`."""

    def __repr__(self) -> str:
        what = (
            f"feature {self.asked['feature']}" if self.asked else f"a direction of norm {float(self.vector.norm()):.3g}"
        )
        bounds = f" from {self.bounds.low:g} to {self.bounds.high:g}" if self.mode == "cap" else ""
        return f"<{self.mode} {self.strength:g}{bounds} of {what} at {self.hook_name}>"

    @property
    def sets(self) -> tuple[tuple[Any, int], ...]:
        """What two edits must not both set, each with the end of it (0: both); nothing for one that adds."""
        if self.mode in ("raw", "resid_norm"):
            return ()
        unit = self.vector.double() / self.vector.double().norm()
        return (((self.hook_name, tuple((unit * unit[unit.abs().argmax()].sign()).float().tolist())), 0),)

    @property
    def d_in(self) -> int:
        """Width of the activations it edits."""
        return self.vector.numel()

    @torch.no_grad()
    def apply(
        self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq d_in"]:
        """The edited activations, in the dtype of `x`, computed in fp32."""
        if self.mode in ("raw", "resid_norm") and self.strength == 0:
            return x
        vector, wide = self.vector.to(x.device), x.float()
        unit = (vector.double() / vector.double().norm()).float()  # its square may overflow or underflow fp32
        if self.mode == "raw":
            change = self.strength * vector.expand_as(wide)
        elif self.mode == "resid_norm":
            change = self.strength * wide.double().norm(dim=-1, keepdim=True).float() * unit
        else:
            change = self._of_component(wide @ unit)[..., None] * unit
        return torch.where((positions > 0)[..., None], (wide + change).to(x.dtype), x)

    def _of_component(self, along: Float[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
        """The change of the component along the direction."""
        if self.mode == "ablate":
            return -along
        if self.mode == "cap":
            return along.clamp(*self.bounds) - along
        return self.strength - along if self.mode == "clamp" else along * self.strength - along


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

    project_out = ablate

    def scale(self, factor: float) -> VectorEdit:
        """An edit that multiplies the activation's component along the direction."""
        return VectorEdit(self.hook_name, self.vector, "scale", finite(factor))

    def clamp(self, value: float) -> VectorEdit:
        """An edit that sets the activation's component along the unit vector, in the activation's units."""
        return VectorEdit(self.hook_name, self.vector, "clamp", finite(value))

    def cap(self, min: float | None = None, max: float | None = None) -> VectorEdit:
        """An edit that keeps that component between `min` and `max`; None is no bound. Raises `ValueError` without any, or where
        `min` exceeds `max`."""
        return VectorEdit(self.hook_name, self.vector, "cap", bounds=in_range(min, max))

    def above(self, value: float) -> DirectionGate:
        """A gate for `lm.steer(..., gate=)` that is open at tokens whose component along the unit vector exceeds `value`."""
        return DirectionGate(self.hook_name, self.vector, finite(value))

    def as_features(self, sae: SAE, k: int = 10) -> list[FeatureShare]:
        """The features that make it up: see `saelab.edits.decomposition.as_features`."""
        return as_features(self.vector, sae, k, self.hook_name)


def in_range(low: Any, high: Any) -> Range:
    """Both bounds, checked. Raises `ValueError` for none, for `low` above `high`, or for numbers that are not finite."""
    if low is None and high is None:
        raise ValueError("cap needs a bound: give min, max, or both.")
    found = Range(-math.inf if low is None else finite(low), math.inf if high is None else finite(high))
    if found.low > found.high:
        raise ValueError(f"cap with min={low!r} and max={high!r}: min must not exceed max.")
    return found


def finite(value: Any, name: str = "strength") -> float:
    """`value` as a float that is finite in float32. Raises `ValueError` otherwise, naming it."""
    try:
        number = None if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None:
        raise ValueError(f"{name} {value!r} is not a number; give one such as 2.0.")
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} {value!r} is not finite in float32; give a number such as 2.0.")
    return number
