"""Features as plain data, for JSON: what `--json` prints and the MCP server answers. Text is as it stands in the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saelab.features.feature import Feature
from saelab.features.records import Example
from saelab.features.render import around_peak

_TOKENS = {"peak_token": "peak", "top_logit": "top_promoted"}
"""Columns that hold a token id, and the name of its text."""


def store_data(store: Any) -> dict[str, Any]:
    """What a store is of, and how far it was verified."""
    manifest, verified = store.manifest, store.annotations.latest("verified")
    return {
        "folder": str(store.folder),
        "sae": {name: manifest["sae"].get(name) for name in ("variant", "d_sae", "hash")},
        "model": manifest["model"]["name"],
        "hook_name": store.hook_name,
        "n_features": store.d_sae,
        "n_silent": store.count({"n_fired": (None, 0)}),
        "n_tokens": store.n_tokens,
        "split": manifest["split"],
        "signed": store.signed,
        "verified": verified[0].time if verified else None,
    }


def rows_data(store: Any, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table, or dicts with a "feature" and other numbers of it: with the label that counts, and tokens as text."""
    features = [row["feature"] for row in rows]
    given, known = store.labels, {row["feature"]: row["label"] for row in store.rows_of(features)}
    return [_row(store, row, given.get(row["feature"]) or known[row["feature"]]) for row in rows]


def _row(store: Any, row: dict[str, Any], label: str | None) -> dict[str, Any]:
    found = {"feature": row["feature"], **row, "label": label}
    for name, text in _TOKENS.items():
        if (token := found.pop(name, None)) is not None:
            found[text] = store.pieces([token])[0].decode("utf-8", "backslashreplace")
    return found


def feature_data(feature: Feature, n_examples: int = 10, kind: str = "top") -> dict[str, Any]:
    """The card of a feature: its row, its ends, scores and lists, the tokens it promotes, and examples."""
    store, logits = feature.store, feature.dominant_logits
    (row,) = rows_data(store, [feature.row])
    return {
        **row,
        "hook_name": feature.hook_name,
        "ends": [{"sign": end.sign, "n_fired": end.n_fired, "p99": end.p99, "max": end.max} for end in feature.ends],
        "scores": feature.scores,
        "lists": sorted(name for name, members in store.lists.items() if feature.feature in members),
        "promotes": logits.positive,
        "suppresses": logits.negative,
        "examples": [example_data(one) for one in feature.examples(n_examples, kind=kind)],
    }


def example_data(example: Example) -> dict[str, Any]:
    """An example as text before the peak, the peak, and after it."""
    before, peak, after = around_peak(example, len(example.pieces), len(example.pieces))
    where = {"document": example.document, "token": example.document_position}
    return {"value": example.value, **where, "before": before, "peak": peak, "after": after}
