"""Edits of one SAE feature that add the decoded change of its activation to the hook's activations (`rows.py`). For a linear
decoder that is

    h' = h + (z' - z) W_dec / scale

(times the token's size, for an SAE that normalises each token by itself). z is the feature activation the SAE itself encodes,
so its reconstruction error and all other features stay unchanged and TopK does not select again. A token whose z does not
change stays bit-identical. Position 0 (the attention sink, excluded from training) and padding are not edited.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.edits.direction import OPEN, Range
from saelab.edits.rows import edited_rows, encoded_rows, with_moved_features
from saelab.saes import SAE
from saelab.saes.trained_hooks import steered_hooks


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """An edit for `lm.steer`: one change of one feature, built by `FeatureHandle`. Values are in raw feature-activation units."""

    hook_name: str
    sae: SAE
    feature: int
    mode: Literal["add", "clamp", "scale", "cap"]
    value: float | Tensor
    """What is added to the feature activation, what it is clamped to (a tensor: by absolute position), or its factor."""
    where: str = "always"
    """Which tokens are edited: "always", or only where the feature "fires", is "positive" or is "negative"."""
    source: int = -1
    """Source whose decoder row is added, for a crosscoder."""
    bounds: Range = OPEN
    """What "cap" keeps it in."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """How it was asked for, in the words of `FeatureHandle`: what a plan saves."""
    units: Mapping[str, float] = field(default_factory=dict)
    """Those of the handle that built it."""

    @property
    def sets(self) -> tuple[tuple[Any, int], ...]:
        """What two edits must not both set, each with the end of it (0: both); nothing for one that adds."""
        end = {"positive": 1, "negative": -1}.get(self.where, 0)
        return () if self.mode == "add" else (((self.hook_name, id(self.sae), self.feature), end),)

    def each_hook(self) -> tuple[FeatureEdit, ...]:
        """The edit at each hook that its feature writes to: one, but for a feature that predicts several layers."""
        hooks = steered_hooks(self.sae, self.feature, self.source)
        if len(hooks) < 2:
            return (self,)
        return tuple(replace(self, hook_name=name.rpartition("/")[2], source=source) for name, source in hooks)

    @property
    def d_in(self) -> int:
        """Width of the activations it edits."""
        return self.sae.decoder(self.source)[0].shape[1]

    def __repr__(self) -> str:
        value = "values by position" if isinstance(self.value, Tensor) else f"{self.value:g}"
        value = f"{self.bounds.low:g} to {self.bounds.high:g}" if self.mode == "cap" else value
        if self.asked.get("unit") not in (None, "raw") and isinstance(self.asked.get("value"), int | float):
            value += f" ({self.asked['value']:g} {self.asked['unit']})"
        return f"<{self.mode} feature {self.feature} at {self.hook_name}: {value}>"

    def apply(
        self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq d_in"]:
        """The edited activations; `x` itself when nothing changes. Raises `ValueError` for a position without a clamp value."""
        return self.apply_knowing(x, positions, {})

    @torch.no_grad()
    def apply_knowing(
        self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"], known: dict[Any, Any]
    ) -> Float[Tensor, "batch seq d_in"]:
        """As `apply`, with what other edits have computed from the same arguments."""
        flat, rows = edited_rows(x, positions)
        change = self._change(flat, rows, positions, known)  # (n_rows) z' - z
        return with_moved_features(x, rows, self.sae, (self.feature,), change[:, None], known, self.source)

    def _change(self, flat: Tensor, rows: Tensor, positions: Tensor, known: dict[Any, Any]) -> Float[Tensor, " n_rows"]:
        value = self.value
        if self.mode == "add" and self.where == "always":
            return torch.full((len(rows),), float(value), device=flat.device)  # needs no encode
        feature_acts = encoded_rows(self.sae, flat, rows, known)
        z = feature_acts.column(self.feature).to(flat.device, torch.float32)
        if self.mode == "cap":
            change = z.clamp(*self.bounds) - z
        elif self.mode == "clamp":
            change = self._targets(rows, positions).to(flat.device, torch.float32) - z
        else:
            change = z * float(value) - z if self.mode == "scale" else torch.full_like(z, float(value))
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
