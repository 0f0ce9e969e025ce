"""A table with one row per feature: link, metrics, the token it promotes most, and its strongest example."""

from __future__ import annotations

from typing import Any

import numpy as np
import streamlit as st

from saelab.app import state
from saelab.features import Example, FeatureStore
from saelab.features.render import around_peak, cosine, number, percent
from saelab.features.visible import chip_text, escape

_HEADS = {"density": "Density", "n_fired": "Fired", "p99": "p99", "max": "Max", "cosine": "Enc\u2013dec"}


def show_rows(store: FeatureStore, rows: list[dict[str, Any]], sort: str = "", descending: bool = True) -> None:
    """The table; an arrow marks the column it is sorted by."""
    arrow = "\u2193" if descending else "\u2191"
    names = {key: f"{label} {arrow}" if key == sort else label for key, label in _HEADS.items()}
    density, *others = names.values()
    cells = f"<span>{density}</span>" + "".join(f'<span class="sa-num">{name}</span>' for name in others)
    first, second = _columns()
    first.html(f'<div class="sa-head">{f"Feature {arrow}" if sort == "feature" else "Feature"}</div>')
    second.html(f'<div class="sa-grid sa-head">{cells}<span>Promotes</span><span>Best example</span></div>')
    for row in rows:
        first, second = _columns()
        with first:
            state.link("feature", str(row["feature"]), feature=row["feature"])
        second.html(_strip(store, row))


def _columns() -> list[Any]:
    return list(st.columns([1, 13], vertical_alignment="center", gap="small", wrap=False))


def _strip(store: FeatureStore, row: dict[str, Any]) -> str:
    example = store.feature(row["feature"]).examples(1)
    promoted = "\u2013"
    if row["top_logit"] is not None:
        token = store.pieces([row["top_logit"]])[0].decode("utf-8", "backslashreplace")
        promoted = f'<bdi class="sa-chip">{chip_text(token)}</bdi>'
    preview = _preview(example[0]) if example else '<span class="sa-never">never fired</span>'
    minus = '<span title="mostly negative">\u2212</span>' if row["sign"] == -1 else ""
    sizes = [minus + number(row[name]) for name in ("p99", "max")]
    numbers = [f"{row['n_fired']:,}", *sizes, cosine(row["cosine"])]
    cells = "".join(f'<span class="sa-num sa-wide">{value}</span>' for value in numbers)
    return (
        f'<div class="sa-grid">{_bar(row["density"], store.n_tokens)}{cells}'
        f'<span class="sa-clip sa-wide">{promoted}</span><span class="sa-clip sa-wide">{preview}</span></div>'
    )


def _bar(density: float, n_tokens: int) -> str:
    """Density as text and as a bar, on a log scale from one token to all tokens."""
    lowest = np.log10(1 / max(n_tokens, 10))
    width = 0.0 if density <= 0 else max(2.0, 100 * (1 - np.log10(density) / lowest))
    return f'<span class="sa-bar"><span>{percent(density)}</span><i><b style="width:{width:.0f}%"></b></i></span>'


def _preview(example: Example) -> str:
    """One line around the peak."""
    before, peak, after = map(escape, around_peak(example, left=6, right=10))
    return f'<bdi>{before}<bdi class="sa-mark">{peak}</bdi>{after}</bdi>'
