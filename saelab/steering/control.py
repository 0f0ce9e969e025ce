"""The control beside steered text: random directions whose edits are as large, and mean nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saelab.edits.direction import Direction, VectorEdit
from saelab.edits.feature_edit import FeatureEdit
from saelab.steering.plan import Plan


def random_control(plan: Plan, seed: int = 0) -> Plan:
    """The plan with every added vector replaced by a random one of the same norm, drawn with `seed`: what the model says when it
    is pushed as hard in a direction that means nothing.

    Raises `ValueError` for an edit whose change depends on what the SAE reads (clamp, scale, cap, project out): it has no norm.
    """
    generator = torch.Generator().manual_seed(seed)
    return replace(plan, edits=tuple(_random(edit, generator) for edit in plan.edits))


def _random(edit: Any, generator: torch.Generator) -> VectorEdit:
    if isinstance(edit, VectorEdit) and edit.mode in ("raw", "resid_norm"):
        return replace(edit, vector=_of_norm(edit.vector, generator), asked={})
    if isinstance(edit, FeatureEdit) and edit.mode == "add" and edit.where == "always":
        decoder, scale = edit.sae.decoder(edit.source)
        row = float(edit.value) * decoder[edit.feature].detach().float() / scale.float()
        if not bool(row.any()):
            return Direction(torch.ones_like(row), edit.hook_name).add(0.0)
        return Direction(_of_norm(row, generator), edit.hook_name).add(1.0)
    raise ValueError(
        f"{edit!r} has no control: its change depends on what the SAE reads. Controls are for what is added, such as "
        "feature * 2.0."
    )


def _of_norm(vector: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(len(vector), generator=generator).to(vector.device)
    return drawn / drawn.norm() * vector.float().norm()
