"""A plan at several strengths: what `compare` puts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from saelab.edits.direction import Direction, VectorEdit, finite
from saelab.edits.feature_edit import FeatureEdit
from saelab.edits.feature_handle import FeatureHandle
from saelab.models import Steering
from saelab.steering.plan import Plan

_LARGEST = torch.finfo(torch.float32).max
FOR_FEATURES = (1.0, 2.0, 4.0)
"""Strengths, in p99, for features whose strength is not said."""


def as_plan(edits: Any) -> Plan:
    """A plan of edits, or the plan that is given. A feature, an end or a `FeatureHandle` becomes an edit that adds 1 p99, a
    direction one that adds itself once. Raises `ValueError` for anything else, and for a plan among edits."""
    if isinstance(edits, Steering):
        return edits if isinstance(edits, Plan) else Plan(**vars(edits))
    listed = list(edits) if isinstance(edits, Sequence) else [edits]
    if not listed:
        raise ValueError("There is nothing to steer with: give a feature, an edit such as feature * 2.0, or a Plan.")
    return Plan(tuple(handle_of(one).add(1.0) if is_feature(one) else _edit(one) for one in listed))


def is_feature(one: Any) -> bool:
    """Whether this is a feature (of a store, its end, or a handle), and no edit yet."""
    return isinstance(getattr(one, "handle", one), FeatureHandle)


def handle_of(feature: Any) -> FeatureHandle:
    """The handle of a feature, an end, or itself."""
    return getattr(feature, "handle", feature)


def _edit(one: Any) -> Any:
    if isinstance(one, Direction):
        return one.add(1.0)
    if isinstance(one, Steering):
        raise ValueError("A plan stands alone: give it instead of a list, or its edits (plan.edits) among the others.")
    if not callable(getattr(one, "apply", None)):
        raise ValueError(f"{one!r} is neither a feature nor an edit: give feature, feature * 2.0, or a Plan.")
    return one


def adds(edit: Any) -> bool:
    """Whether an edit adds something, whose size a strength multiplies."""
    if isinstance(edit, FeatureEdit):
        return edit.mode == "add"
    return isinstance(edit, VectorEdit) and edit.mode in ("raw", "resid_norm")


def scaled(plan: Plan, strength: float) -> Plan:
    """The plan with everything that it adds multiplied by `strength`; what clamps, scales or removes stays as it is."""
    return replace(plan, edits=tuple(_times(edit, strength) if adds(edit) else edit for edit in plan.edits))


def _times(edit: Any, strength: float) -> Any:
    asked = {**edit.asked, "value": finite(edit.asked["value"] * strength)} if "value" in edit.asked else edit.asked
    if isinstance(edit, VectorEdit):
        return replace(edit, strength=finite(edit.strength * strength), asked=asked)
    return replace(edit, value=finite(edit.value * strength), asked=asked)


def checked_strengths(strengths: Any, plan: Plan, all_features: bool) -> tuple[float, ...]:
    """The strengths as numbers; None: `FOR_FEATURES` where only features are given, else 1. Raises `ValueError` for others than
    finite numbers, each once, and for several where nothing is added."""
    if strengths is None:
        return FOR_FEATURES if all_features else (1.0,)
    listed = list(strengths) if isinstance(strengths, Sequence) and not isinstance(strengths, str) else [strengths]
    if not listed or not all(_is_finite(one) for one in listed) or len(set(listed)) < len(listed):
        raise ValueError(f"strengths={strengths!r}; expected numbers, each once, such as [0.5, 1, 2].")
    if listed != [1.0] and not any(map(adds, plan.edits)):
        raise ValueError(
            f"strengths={strengths!r} multiply what is added, but the edits ({', '.join(map(repr, plan.edits))}) add nothing: "
            "leave them out, and give one comparison for each clamp or scale."
        )
    return tuple(float(one) for one in listed)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
