"""The control beside steered text: random directions whose edits are as large, and mean nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.edits.direction import Direction, VectorEdit
from saelab.edits.feature_edit import FeatureEdit
from saelab.models.steered import at_each_hook
from saelab.saes.token_norm import TOKEN_NORMS
from saelab.steering.plan import Plan


@dataclass(frozen=True, eq=False)
class TurnedEdit:
    """Adds a direction, at each token as much of it as another edit changes there: for edits whose size depends on the token."""

    hook_name: str
    edit: FeatureEdit
    unit: Float[Tensor, " d_in"]

    @torch.no_grad()
    def apply(
        self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq d_in"]:
        """The edited activations, in the dtype of `x`, computed in fp32."""
        wide = x.float()
        size = (self.edit.apply(wide, positions) - wide).norm(dim=-1, keepdim=True)
        return torch.where((positions > 0)[..., None], (wide + size * self.unit.to(x.device)).to(x.dtype), x)


def random_control(plan: Plan, seed: int = 0) -> Plan:
    """The plan with every added vector replaced by a random one of the same norm, drawn with `seed`: what the model says when it
    is pushed as hard in a direction that means nothing.

    Raises `ValueError` for an edit whose change depends on what the SAE reads (clamp, scale, cap, project out): it has no norm.
    """
    generator = torch.Generator().manual_seed(seed)
    edits = at_each_hook(plan.edits)
    return replace(plan, edits=tuple(along(edit, torch.randn(_width(edit), generator=generator)) for edit in edits))


def along(edit: Any, direction: Float[Tensor, " d_in"]) -> VectorEdit | TurnedEdit:
    """What the edit adds, turned into `direction`, at the same norm. Raises `ValueError` as `random_control`."""
    added = _added(edit)
    if not bool(added.any()):
        return Direction(torch.ones_like(added), edit.hook_name).add(0.0)
    unit = direction.to(added.device, torch.float32) / direction.float().norm()
    turned = unit * added.norm()
    if isinstance(edit, VectorEdit):
        return replace(edit, vector=turned, asked={})
    if edit.sae.config.normalize in TOKEN_NORMS or not edit.sae.additive:
        return TurnedEdit(edit.hook_name, edit, unit)
    return Direction(turned, edit.hook_name).add(1.0)


def _added(edit: Any) -> Float[Tensor, " d_in"]:
    """The vector that an edit adds: of a direction, before its strength; of a feature, along its decoder row."""
    if isinstance(edit, VectorEdit) and edit.mode in ("raw", "resid_norm"):
        return edit.vector.float()
    if isinstance(edit, FeatureEdit) and edit.mode == "add" and edit.where == "always":
        decoder, scale = edit.sae.decoder(edit.source)
        return float(edit.value) * decoder[edit.feature].detach().float() / scale.float()
    raise ValueError(
        f"{edit!r} has no control: its change depends on what the SAE reads. Controls are for what is added, such as "
        "feature * 2.0."
    )


def _width(edit: Any) -> int:
    return len(_added(edit))
