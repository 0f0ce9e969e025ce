"""`steer_score`, the column of the table that is not in the store: how far steering with a feature read back in fluent text
(`saelab.steering.find`), from the annotations."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from saelab.features.annotations import Annotations
from saelab.features.numbers import signed

STEER_SCORE = "steer_score"
STEERS = 0.1
"""Score from which a feature counts as one to steer with."""
_JOINED = (
    'feature LEFT JOIN (SELECT CAST("key" AS INTEGER) AS tried, value AS steer_score FROM json_each(?)) '
    "ON tried = feature.feature"
)


def steer_scores(annotations: Annotations) -> dict[int, float]:
    """By feature, of those that were tried."""
    found = {entry.feature: entry.value for entry in annotations.latest("steer")}
    return {feature: float(value["score"]) for feature, value in found.items() if "score" in _told(value)}


def source(annotations: Annotations, columns: Iterable[str]) -> tuple[str, list[Any]]:
    """What a query that names these columns selects from, and the values of its marks."""
    if STEER_SCORE not in columns:
        return "feature", []
    return _JOINED, [json.dumps(steer_scores(annotations))]


def steer_text(annotations: Annotations, feature: int) -> str | None:
    """What was found when the feature was tried, in one line; None if it was not."""
    found = [one for entry in annotations.latest("steer", feature=feature) if "score" in (one := _told(entry.value))]
    if not found:
        return None
    told = found[0]
    more, cost = signed(100 * told["read_back"], 0), signed(told["nll_cost"], 2)
    return (
        f"Steering score {told['score']:.2f}: at {told['strength']:g} p99 it reads back on {more} % of the text against "
        f"unsteered text, at {cost} nats per token."
    )


def _told(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
