"""Edits of one SAE feature that add the decoded change of its activation to the hook's activations:

    h' = h + (z' - z) W_dec / scale

(times the token's size, for an SAE that normalises each token by itself). z is the feature activation the SAE itself encodes,
so its reconstruction error and all other features stay unchanged and TopK does not select again. A token whose z does not
change stays bit-identical. Position 0 (the attention sink, excluded from training) and padding are not edited.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import SaelabError
from saelab.saes import SAE
from saelab.saes.trained_hooks import needs_other_hooks, refuse_partial, steered_hook

UNITS = ("p99", "max", "mean", "raw")


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """An edit for `lm.steer`: one change of one feature, built by `FeatureHandle`. `value` is in raw feature-activation units."""

    hook_name: str
    sae: SAE
    feature: int
    mode: Literal["add", "clamp", "scale"]
    value: float | Tensor
    """What is added to the feature activation, what it is clamped to (a tensor: by absolute position), or its factor."""
    where: str = "always"
    """Which tokens are edited: "always", or only where the feature "fires", is "positive" or is "negative"."""
    source: int = -1
    """Source whose decoder row is added, for a crosscoder."""

    @property
    def d_in(self) -> int:
        """Width of the activations it edits."""
        return self.sae.decoder(self.source)[0].shape[1]

    def __repr__(self) -> str:
        value = "values by position" if isinstance(self.value, Tensor) else f"{self.value:g}"
        return f"<{self.mode} feature {self.feature} at {self.hook_name}: {value}>"

    @torch.no_grad()
    def apply(
        self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq d_in"]:
        """The edited activations; `x` itself when nothing changes. Raises `ValueError` for a position without a clamp value."""
        flat = x.reshape(-1, x.shape[-1])  # (batch * seq, d_in)
        rows = (positions > 0).flatten().nonzero().squeeze(1)
        change = self._change(flat, rows, positions)  # (n_rows) z' - z
        moved = change != 0
        if not moved.any():
            return x
        rows, change = rows[moved], change[moved]
        decoder, scale = self.sae.decoder(self.source)
        direction = (decoder[self.feature].float() / scale.float()).to(x.device)
        edited = flat.clone()
        before = flat[rows].float()
        edited[rows] = (before + change[:, None] * self.sae.token_sizes(before) * direction).to(x.dtype)
        return edited.reshape(x.shape)

    def _change(self, flat: Tensor, rows: Tensor, positions: Tensor) -> Float[Tensor, " n_rows"]:
        if self.mode == "add" and self.where == "always":
            return torch.full((len(rows),), float(self.value), device=flat.device)  # needs no encode
        weight = self.sae.W_dec
        z = self.sae.encode(flat[rows].to(weight.device)).column(self.feature).to(flat.device, torch.float32)
        if self.mode == "scale":
            change = z * float(self.value) - z
        elif self.mode == "add":
            change = torch.full_like(z, float(self.value))
        else:
            change = self._targets(rows, positions).to(flat.device, torch.float32) - z
        if self.where == "always":
            return change
        here = {"fires": z != 0, "positive": z > 0, "negative": z < 0}[self.where]
        return torch.where(here, change, 0.0)

    def _targets(self, rows: Tensor, positions: Tensor) -> Float[Tensor, " n_rows"]:
        """The clamp value of each row."""
        if not isinstance(self.value, Tensor):
            return torch.full((len(rows),), float(self.value))
        batch, seq = positions.shape
        if self.value.ndim == 2 and self.value.shape[0] != batch:
            raise ValueError(
                f"clamp values are for a batch of {self.value.shape[0]}, but the model runs a batch of {batch}; "
                "give values (seq,) or (batch, seq) that match."
            )
        where = positions.flatten()[rows].to(self.value.device)
        if len(where) and int(where.max()) >= self.value.shape[-1]:
            raise ValueError(
                f"clamp values cover positions 0 to {self.value.shape[-1] - 1}, but the model is at position "
                f"{int(where.max())}; give one value for every token that is read or generated."
            )
        values = self.value if self.value.ndim == 2 else self.value.expand(batch, -1)
        return values[(rows // seq).to(values.device), where]


class FeatureHandle:
    """One feature of an SAE and the units its strengths are measured in.

    `units` maps "p99", "max" and "mean" to feature activations (over the tokens on which it fires), negative if its dominant
    end is; `no_units` says why there are none. With `end` 1 or -1 they are magnitudes: positive strengths, raw ones too,
    steer towards that sign, and scale, ablate and clamp where it fires act only where it has that sign.

    `hook_name` defaults to the hook the SAE was trained on; for a transcoder to the one it predicts, for a crosscoder to
    its last source. The feature activations of those two cannot be computed from that hook alone, so they support only
    `add`. Raises `ValueError` for a feature the SAE does not have, or when no hook is known.
    """

    def __init__(
        self,
        sae: SAE,
        feature: int,
        hook_name: str | None = None,
        units: Mapping[str, float] | None = None,
        *,
        end: Literal[-1, 0, 1] = 0,
        no_units: str = "",
    ):
        if not 0 <= feature < sae.d_sae:
            raise ValueError(f"feature={feature} does not exist; this SAE has features 0 to {sae.d_sae - 1}.")
        hook_name, self.source = steered_hook(sae, hook_name)
        if hook_name is None:
            raise ValueError("The SAE does not record the hook it was trained on; pass hook_name.")
        self.sae, self.feature = sae, int(feature)
        self.hook_name = hook_name.rpartition("/")[2]  # "MODEL/HOOK" for an SAE of several models
        self.units = dict(units or {})
        self.end, self.no_units = end, no_units

    def __repr__(self) -> str:
        return f"FeatureHandle(feature {self.feature} at {self.hook_name}, units {self.units})"

    def __mul__(self, strength: float) -> FeatureEdit:
        """An edit that adds `strength` times the feature's p99 activation."""
        return self.add(strength)

    __rmul__ = __mul__

    def add(self, value: float, unit: str = "p99") -> FeatureEdit:
        """An edit that adds `value` in `unit` ("p99", "max", "mean", "raw") to the feature activation of every token."""
        return self._edit("add", finite(value) * self.unit(unit))

    def clamp(self, value: Any, unit: str = "p99", where: str = "always") -> FeatureEdit:
        """An edit that sets the feature activation to `value`: a number, or a tensor `(seq,)` or `(batch, seq)` by absolute
        position.

        `where="fires"` edits only tokens on which the feature fires. Raises `ValueError` for an unknown `where` or
        unit, or values that are not finite, `SaelabError` for a missing unit.
        """
        if where not in ("always", "fires"):
            raise ValueError(f"where={where!r}; expected 'always' or 'fires'.")
        factor, where = self.unit(unit), where if where == "always" else self._firing
        if isinstance(value, Tensor) and value.ndim:
            if value.ndim > 2 or not value.numel() or not bool(value.isfinite().all()):
                raise ValueError(
                    f"clamp values are {tuple(value.shape)}; expected finite values (seq,) or (batch, seq), one per token."
                )
            return self._edit("clamp", value.detach().float() * factor, where)
        return self._edit("clamp", finite(value) * factor, where)

    def scale(self, factor: float) -> FeatureEdit:
        """An edit that multiplies the feature activation by `factor`: 1.0 changes nothing, 0.0 ablates."""
        return self._edit("scale", finite(factor), self._firing if self.end else "always")

    def ablate(self) -> FeatureEdit:
        """An edit that sets the feature activation to zero; tokens on which the feature is silent stay bit-identical."""
        return self.scale(0.0)

    @property
    def _firing(self) -> str:
        return {0: "fires", 1: "positive", -1: "negative"}[self.end]

    def unit(self, unit: str) -> float:
        """One `unit` as a raw feature activation. Raises `ValueError` for an unknown unit, `SaelabError` for a missing one."""
        if unit not in UNITS:
            raise ValueError(f"unit={unit!r} is unknown; expected one of {', '.join(UNITS)}.")
        size = 1.0 if unit == "raw" else self.units.get(unit)
        if size is None or not math.isfinite(size) or size == 0:
            why = self.no_units or (
                "it never fired in its store, or the handle has no store. Use a feature that fires, from a store "
                "(`load_features(...).feature(i)`), or use unit='raw'."
            )
            raise SaelabError(f"feature {self.feature} has no {unit} activation: {why}")
        return float(size) * (self.end or 1)

    def _edit(
        self, mode: Literal["add", "clamp", "scale"], value: float | Tensor, where: str = "always"
    ) -> FeatureEdit:
        refuse_partial(self.sae, "steered")
        value = value if isinstance(value, Tensor) else finite(value)
        if mode != "add" and needs_other_hooks(self.sae):
            raise ValueError(
                f"{mode} needs the feature's activation, which this {self.sae.variant} cannot compute from {self.hook_name} "
                "alone: use add (feature * 2.0)."
            )
        return FeatureEdit(self.hook_name, self.sae, self.feature, mode, value, where, self.source)


def finite(value: Any) -> float:
    """`value` as a float that is finite in float32. Raises `ValueError` otherwise."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"strength {value!r} is not a number; give one such as 2.0.") from error
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(f"strength {value!r} is not finite in float32; give a number such as 2.0.")
    return number
