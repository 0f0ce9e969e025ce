"""One feature of an SAE, from which edits and gates are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from saelab.edits.direction import Direction, Range, VectorEdit, finite, in_range
from saelab.edits.feature_edit import FeatureEdit
from saelab.edits.gate import FeatureGate
from saelab.errors import SaelabError
from saelab.saes import SAE
from saelab.saes.trained_hooks import needs_other_hooks, refuse_partial, steered_hook

UNITS = ("p99", "max", "mean", "raw")
_ALONG = "resid_norm"
"""Unit of an edit along the decoder row that does not look at the feature's activation."""


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
        return self._edit("add", finite(strength) * self.unit("p99"), value=finite(strength), unit="p99")

    __rmul__ = __mul__

    def add(self, value: float, unit: str = "p99") -> Any:
        """An edit that adds `value` in `unit` ("p99", "max", "mean", "raw") to the feature activation of every token; with
        "resid_norm" the decoder row's unit vector times `value` times each activation's norm."""
        if unit == _ALONG:
            edit = self.direction.add(value, unit)
            return replace(
                edit, asked=self._asked("add", value=finite(value), unit=unit, sae=self.sae, sign=self._sign)
            )
        return self._edit("add", finite(value) * self.unit(unit), value=finite(value), unit=unit)

    def clamp(self, value: Any, unit: str = "p99", where: str = "always") -> FeatureEdit:
        """An edit that sets the feature activation to `value`: a number, or a tensor `(seq,)` or `(batch, seq)` by absolute
        position.

        `where="fires"` edits only tokens on which the feature fires. Raises `ValueError` for an unknown `where` or
        unit, or values that are not finite, `SaelabError` for a missing unit.
        """
        if where not in ("always", "fires"):
            raise ValueError(f"where={where!r}; expected 'always' or 'fires'.")
        factor, tokens = self.unit(unit), where if where == "always" else self._firing
        asked = {"unit": unit, "where": where}
        if isinstance(value, Tensor) and value.ndim:
            if value.ndim > 2 or not value.numel() or not bool(value.isfinite().all()):
                raise ValueError(
                    f"clamp values are {tuple(value.shape)}; expected finite values (seq,) or (batch, seq), one per token."
                )
            values = value.detach().float()
            return self._edit("clamp", values * factor, tokens, value=values.tolist(), **asked)
        return self._edit("clamp", finite(value) * factor, tokens, value=finite(value), **asked)

    def scale(self, factor: float) -> FeatureEdit:
        """An edit that multiplies the feature activation by `factor`: 1.0 changes nothing, 0.0 ablates."""
        return self._edit("scale", finite(factor), self._firing if self.end else "always", value=finite(factor))

    def ablate(self) -> FeatureEdit:
        """An edit that sets the feature activation to zero; tokens on which the feature is silent stay bit-identical."""
        return self.scale(0.0)

    def cap(self, min: float | None = None, max: float | None = None, unit: str = "p99") -> FeatureEdit:
        """An edit that keeps the feature activation between `min` and `max`; None is no bound. Raises `ValueError` without any,
        or where `min` exceeds `max`."""
        bounds, factor = in_range(min, max), self.unit(unit)
        low, high = sorted((bounds.low * factor, bounds.high * factor))
        edit = self._edit("cap", 0.0, self._firing if self.end else "always", min=min, max=max, unit=unit)
        return replace(edit, bounds=Range(low, high))

    def project_out(self) -> VectorEdit:
        """An edit that removes the decoder row's direction from every activation, whether or not the feature fires."""
        return replace(self.direction.ablate(), asked=self._asked("project_out", sae=self.sae))

    def above(self, value: float, unit: str = "p99") -> FeatureGate:
        """A gate for `lm.steer(..., gate=)` that is open at tokens on which the feature's activation exceeds `value`."""
        refuse_partial(self.sae, "read")
        if needs_other_hooks(self.sae):
            raise ValueError(
                f"A gate needs the feature's activation, which this {self.sae.variant} cannot compute from {self.hook_name} "
                "alone: gate with a direction (direction.above)."
            )
        bound = finite(value) * (self._sign if unit == "raw" else self.unit(unit))  # raw: towards its dominant end
        return FeatureGate(
            self.hook_name,
            self.sae,
            self.feature,
            bound,
            self._sign,
            self._asked("above", value=finite(value), unit=unit, sign=self._sign),
            self.units,
        )

    @property
    def direction(self) -> Direction:
        """The decoder row in raw units, towards the feature's dominant end; where a decoder is not linear, its linear part."""
        decoder, scale = self.sae.decoder(self.source)
        row = decoder[self.feature].detach().float() / scale.float()
        return Direction(row * self._sign, self.hook_name)

    @property
    def _sign(self) -> Literal[-1, 1]:
        """Towards which sign positive strengths steer."""
        return -1 if (self.end or self.units.get("p99", 1.0)) < 0 else 1

    @property
    def _firing(self) -> str:
        return {0: "fires", 1: "positive", -1: "negative"}[self.end]

    def unit(self, unit: str) -> float:
        """One `unit` as a raw feature activation. Raises `ValueError` for an unknown unit, `SaelabError` for a missing one."""
        if unit not in UNITS:
            raise ValueError(f"unit={unit!r} is unknown; expected one of {', '.join(UNITS)}, or for add {_ALONG}.")
        size = 1.0 if unit == "raw" else self.units.get(unit)
        if size is None or not math.isfinite(size) or size == 0:
            why = self.no_units or (
                "it never fired in its store, or the handle has no store. Use a feature that fires, from a store "
                "(`load_features(...).feature(i)`), or use unit='raw'."
            )
            raise SaelabError(f"feature {self.feature} has no {unit} activation: {why}")
        return float(size) * (self.end or 1)

    def _edit(self, mode: Any, raw: float | Tensor, tokens: str = "always", **asked: Any) -> FeatureEdit:
        refuse_partial(self.sae, "steered")
        raw = finite(raw) if isinstance(raw, float) else raw
        if mode != "add" and needs_other_hooks(self.sae):
            raise ValueError(
                f"{mode} needs the feature's activation, which this {self.sae.variant} cannot compute from {self.hook_name} "
                "alone: use add (feature * 2.0)."
            )
        told, units = self._asked(mode, **asked), self.units
        return FeatureEdit(
            self.hook_name, self.sae, self.feature, mode, raw, tokens, self.source, asked=told, units=units
        )

    def _asked(self, mode: str, **asked: Any) -> dict[str, Any]:
        return {"feature": self.feature, "do": mode, **asked, "end": self.end}
