"""Edits of one SAE feature, by delta-decode (algorithms: the decoded difference of the codes is added):

    h' = h + (z' - z) W_dec / scale

z is what the SAE itself encodes, so its error and all other features stay as they are and TopK never selects anew. A
token whose code does not change keeps its bits. Position 0 (the attention sink, left out of training) and padding are
left alone.
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
from saelab.saes.trained_hooks import needs_other_hooks, steered_hook

UNITS = ("p99", "max", "mean", "raw")


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """What `lm.steer` takes: one feature, one change. Built by `FeatureHandle`; `value` is in code units."""

    hook_name: str
    sae: SAE
    feature: int
    mode: Literal["add", "clamp", "scale"]
    value: float | Tensor
    """Added to the code, or what it becomes (a tensor holds one by absolute position), or its factor."""
    where: str = "always"
    """Every token, or only those on which the feature "fires", or is "positive" or "negative"."""
    source: int = -1
    """Which of a crosscoder's decoder rows is added."""

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
        """The edited activations; `x` itself when no code changes. Raises `ValueError` for a position without value."""
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
        edited[rows] = (flat[rows].float() + change[:, None] * direction).to(x.dtype)
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
        """What a clamp sets the code of each row to."""
        if not isinstance(self.value, Tensor):
            return torch.full((len(rows),), float(self.value))
        batch, seq = positions.shape
        if self.value.ndim == 2 and self.value.shape[0] != batch:
            raise ValueError(f"clamp values are for {self.value.shape[0]} sequences, the model runs {batch}.")
        where = positions.flatten()[rows].to(self.value.device)
        if len(where) and int(where.max()) >= self.value.shape[-1]:
            raise ValueError(
                f"clamp values hold positions 0 to {self.value.shape[-1] - 1}, the model is at position "
                f"{int(where.max())}; give one value for every token that will be read or generated."
            )
        values = self.value if self.value.ndim == 2 else self.value.expand(batch, -1)
        return values[(rows // seq).to(values.device), where]


class FeatureHandle:
    """One feature of an SAE and the units its strength is measured in.

    `units` maps "p99", "max", "mean" to activations (of the tokens on which the feature fires), negative where it mostly is;
    `no_units` says why there are none. With `end` 1 or -1 they are magnitudes: every strength, a raw one too, counts towards
    that sign, and edits of what the feature does itself act only where it has that sign. `hook_name` is by default the hook
    the SAE was trained on; a transcoder's is the one it predicts, a crosscoder's the last of its sources. The code of those
    two cannot be read off that hook alone: they can only be added to. Raises `ValueError` for a feature the SAE does not
    have.
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
            raise ValueError("The SAE does not say which hook it was trained on; give hook_name=.")
        self.sae, self.feature = sae, int(feature)
        self.hook_name = hook_name.rpartition("/")[2]  # "MODEL/HOOK" where several models were read
        self.units = dict(units or {})
        self.end, self.no_units = end, no_units

    def __repr__(self) -> str:
        return f"FeatureHandle(feature {self.feature} at {self.hook_name}, units {self.units})"

    def __mul__(self, strength: float) -> FeatureEdit:
        """Add `strength` times the feature's p99 activation."""
        return self.add(strength)

    __rmul__ = __mul__

    def add(self, value: float, unit: str = "p99") -> FeatureEdit:
        """Add `value`, in "p99", "max", "mean" or "raw" (code units), to the code of every token."""
        return self._edit("add", finite(value) * self.unit(unit))

    def clamp(self, value: Any, unit: str = "p99", where: str = "always") -> FeatureEdit:
        """Set the code to `value`: a number, or a tensor `(seq,)` or `(batch, seq)` with one by absolute position.

        `where="fires"` leaves tokens alone on which the feature is silent.
        """
        if where not in ("always", "fires"):
            raise ValueError(f"where={where!r}; expected 'always' or 'fires'.")
        factor, where = self.unit(unit), where if where == "always" else self._firing
        if isinstance(value, Tensor) and value.ndim:
            if value.ndim > 2 or not value.numel() or not bool(value.isfinite().all()):
                raise ValueError(
                    f"clamp values are {tuple(value.shape)}; expected finite (seq,) or (batch, seq), one a token."
                )
            return self._edit("clamp", value.detach().float() * factor, where)
        return self._edit("clamp", finite(value) * factor, where)

    def scale(self, factor: float) -> FeatureEdit:
        """Multiply the code by `factor`: 1.0 changes nothing, 0.0 ablates."""
        return self._edit("scale", finite(factor), self._firing if self.end else "always")

    def ablate(self) -> FeatureEdit:
        """Set the code to zero; tokens on which the feature is silent keep their bits."""
        return self.scale(0.0)

    @property
    def _firing(self) -> str:
        return {0: "fires", 1: "positive", -1: "negative"}[self.end]

    def unit(self, unit: str) -> float:
        """One `unit` in code units. Raises `ValueError` for an unknown unit, `SaelabError` for one that is missing."""
        if unit not in UNITS:
            raise ValueError(f"unit={unit!r} is unknown; expected one of {', '.join(UNITS)}.")
        size = 1.0 if unit == "raw" else self.units.get(unit)
        if size is None or not math.isfinite(size) or size == 0:
            why = self.no_units or (
                "its store saw it never fire, or there is no store. Take a feature that fires from a store "
                "(`load_features(...).feature(i)`), or give unit='raw'."
            )
            raise SaelabError(f"feature {self.feature} has no {unit} activation: {why}")
        return float(size) * (self.end or 1)

    def _edit(
        self, mode: Literal["add", "clamp", "scale"], value: float | Tensor, where: str = "always"
    ) -> FeatureEdit:
        value = value if isinstance(value, Tensor) else finite(value)
        if mode != "add" and needs_other_hooks(self.sae):
            raise ValueError(
                f"{mode} needs the feature's code, which this {self.sae.variant} does not read off {self.hook_name} alone: "
                "use add (feature * 2.0)."
            )
        return FeatureEdit(self.hook_name, self.sae, self.feature, mode, value, where, self.source)


def finite(value: Any) -> float:
    """`value` as a number that is finite in float32 too. Raises `ValueError` otherwise."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"strength {value!r} is no number.") from error
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(f"strength {value!r} is not finite; give an ordinary number, such as 2.0.")
    return number
