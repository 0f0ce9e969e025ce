"""A table with one row per feature: label, metrics and its strongest example; the whole row is a link."""

from __future__ import annotations

from typing import Any

import streamlit as st

from saelab.app import state
from saelab.app.feature_notes import STARRED
from saelab.features import Example, FeatureStore
from saelab.features.render import around_peak, cosine, fixed, percent
from saelab.features.steer_scores import STEER_SCORE
from saelab.features.visible import escape

_HEADS = {
    "label": ("Label", "", "Written by hand or by a model, else the commonest words at its peaks."),
    "density": ("Density", "sa-num", "Share of counted tokens on which it fires."),
    "sharpness": ("Sharpness", "sa-num sa-wide", "How many bits a firing tells about the word it is on."),
    "p99": ("p99", "sa-num sa-wider", "99th percentile of its activations: the unit of steering strengths."),
    "max": ("Max", "sa-num sa-wider", "Its largest activation."),
    "cosine": ("Enc\u2013dec", "sa-num sa-wider", "Cosine similarity of its encoder and decoder rows."),
    "steer_score": (
        "Steers",
        "sa-num sa-wider",
        "Steering score: share of a steered text on which it fires, times fluency.",
    ),
    "example": ("Strongest example", "sa-last", "The text around its largest activation."),
}
_DENSE, DASH = 0.1, "\u2013"
_MARK = '<span class="sa-mark-dense" title="Fires on more than 10 % of tokens">dense</span> '
_STAR = '<span title="starred">\u2605</span> '
_FOUND = {
    "note": '<span class="sa-mark-dense" title="The words stand in a note on it">in a note</span> ',
    "text": '<span class="sa-mark-dense" title="The words stand in the text around its peaks, not at them">in the text</span> ',
}


def show_rows(
    store: FeatureStore,
    rows: list[dict[str, Any]],
    sort: str = "",
    descending: bool = True,
    query: dict[str, str] | None = None,
) -> None:
    """The table; an arrow marks the column it is sorted by. Links carry `query`, so that Next follows the table."""
    arrow, labels = "\u2193" if descending else "\u2191", store.labels
    starred = set(store.lists.get(STARRED, []))
    tried = any(row[STEER_SCORE] is not None for row in rows)
    cells = "".join(
        f'<span class="{classes}" title="{meaning}">{name}{f" {arrow}" if key == sort else ""}</span>'
        for key, (name, classes, meaning) in _shown(tried).items()
    )
    with st.container(key="sa-head"):
        first, second = _columns()
    first.html(f'<div class="sa-head">{f"Feature {arrow}" if sort == "feature" else "Feature"}</div>')
    second.html(f'<div class="{_grid(tried)} sa-head">{cells}</div>')
    for row in rows:
        with st.container(key=f"sa-row-{row['feature']}"):
            first, second = _columns()
            with first:
                state.link("feature", str(row["feature"]), feature=row["feature"], **(query or {}))
            second.html(_strip(store, row, labels.get(row["feature"]), row["feature"] in starred, tried))


def _columns() -> list[Any]:
    return list(st.columns([1, 13], vertical_alignment="center", gap="small", wrap=False))


def _shown(tried: bool) -> dict[str, tuple[str, str, str]]:
    """The columns: the steering score only where a feature of the page was tried."""
    return {key: head for key, head in _HEADS.items() if tried or key != STEER_SCORE}


def _grid(tried: bool) -> str:
    return "sa-grid sa-tried" if tried else "sa-grid"


def _strip(store: FeatureStore, row: dict[str, Any], given: str | None, starred: bool, tried: bool) -> str:
    example = store.feature(row["feature"]).examples(1)
    preview = _preview(example[0]) if example else '<span class="sa-never">never fired</span>'
    minus = '<span title="mostly negative">\u2212</span>' if row["sign"] == -1 else ""
    marks = (
        (_STAR if starred else "")
        + (_MARK if row["density"] > _DENSE else "")
        + _FOUND.get(row.get("found_in", ""), "")
    )
    label = given or row["label"]
    cells = {
        "label": f'<bdi class="sa-label">{marks}{escape(label or DASH)}</bdi>',
        "density": percent(row["density"]),
        "sharpness": fixed(row["sharpness"], 1),
        "p99": minus + fixed(row["p99"], 2),
        "max": minus + fixed(row["max"], 2),
        "cosine": cosine(row["cosine"]),
        STEER_SCORE: fixed(row[STEER_SCORE], 2),
        "example": preview,
    }
    shown = {key: classes for key, (_, classes, _) in _shown(tried).items()}
    spans = "".join(f'<span class="{classes or "sa-first"}">{cells[key]}</span>' for key, classes in shown.items())
    return f'<div class="{_grid(tried)}">{spans}</div>'


def _preview(example: Example) -> str:
    """One line around the peak, which begins near it so that it is never cut off."""
    before, peak, after = map(escape, around_peak(example, left=3, right=12))
    return f'<bdi>{before}<bdi class="sa-mark">{peak}</bdi>{after}</bdi>'
