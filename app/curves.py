"""Vega-Lite charts of the Runs page as pure functions of the data, without Streamlit: training curves and FVU against L0.

The first page should not wait for plotly's 5 MB of scripts. Vega runs in its interpreter, which the page's policy allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saelab.run_folder.summary import Summary

Points = Sequence[tuple[float, float]]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#7f6fd1", "#8c6d31", "#7f7f7f")
_DASHES = ((1, 0), (7, 3), (2, 2), (9, 3, 2, 3), (4, 2), (12, 3), (1, 3), (6, 2, 1, 2))
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
MAX_CURVES = len(COLOURS)
_TOKENS = "replace(format(datum.value, '~s'), 'G', 'B')"


class Quantity(NamedTuple):
    """Something that training logs."""

    title: str
    meaning: str
    form: str
    """d3's format of a value."""
    from_zero: bool = True


QUANTITIES = {
    "fvu": Quantity("FVU", "Fraction of variance unexplained, on the training batch.", ".4f"),
    "l0": Quantity("L0", "Mean number of features that fire on a token of the training batch.", ",.2f"),
    "dead_fraction_train": Quantity("Dead", "Share of features that have not fired for a while in training.", ".2%"),
    "loss": Quantity("Loss", "What training minimises; it differs between variants.", ",.4~g", False),
    "grad_norm": Quantity("Gradient norm", "Before it is clipped.", ",.4~g"),
    "lr": Quantity("Learning rate", "Of this step.", ".2~e"),
    "tokens_per_second": Quantity("Tokens/s", "Speed of training.", ",.0f"),
}


def line_sample(place: int) -> str:
    """A short piece of the curve at this place of the legend, as HTML."""
    stops, at = [], 0
    for i, length in enumerate(_DASHES[place]):
        stops.append(f"{COLOURS[place] if i % 2 == 0 else 'transparent'} {at}px {at + length}px")
        at += length
    gradient = f"repeating-linear-gradient(90deg,{','.join(stops)})"
    return f'<i class="sa-line" aria-hidden="true" style="background:{gradient}"></i>'


def overlay(curves: Mapping[str, Points], key: str) -> dict[str, Any]:
    """Curves of several SAEs over training tokens; the value of the nearest point is shown on hover."""
    quantity, names = QUANTITIES[key], list(curves)
    x = {
        "field": "tokens", "type": "quantitative", "title": "training tokens", "scale": {"zero": False, "nice": False},
        "axis": {"labelExpr": _TOKENS, "grid": False, "tickCount": 5, "labelFlush": True},
    }  # fmt: skip
    y = {
        "field": "value", "type": "quantitative", "title": None, "scale": {"zero": quantity.from_zero},
        "axis": {"tickCount": 5, "format": ".3~%" if quantity.form.endswith("%") else "~g"},
    }  # fmt: skip
    shown = [
        {"field": "SAE", "type": "nominal"},
        {"field": "tokens", "type": "quantitative", "format": ",", "title": "training tokens"},
        {"field": "value", "type": "quantitative", "format": quantity.form, "title": quantity.title},
    ]
    nearest = {
        "type": "point",
        "on": "pointerover",
        "nearest": True,
        "clear": "pointerout",
        "fields": ["tokens", "SAE"],
    }
    hovered = {"condition": {"param": "hover", "empty": False, "value": 1}, "value": 0}
    return {
        "data": {"values": [{"SAE": name, "tokens": a, "value": b} for name, points in curves.items() for a, b in points]},
        "height": 300,
        "encoding": {"x": x, "y": y, "color": _scale("color", names, COLOURS)},
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 2, "interpolate": "linear"},
                "encoding": {"strokeDash": _scale("strokeDash", names, _DASHES)},
            },
            {
                "params": [{"name": "hover", "select": nearest}],
                "mark": {"type": "point", "filled": True, "size": 70},
                "encoding": {"opacity": hovered, "tooltip": shown},
            },
        ],
    }  # fmt: skip


def _scale(channel: str, names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    scale = {
        "domain": list(names),
        "range": [list(one) if isinstance(one, tuple) else one for one in values[: len(names)]],
    }
    return {"field": "SAE", "type": "nominal", "scale": scale, "legend": None, "title": channel}


def scatter(rows: Sequence[Summary]) -> dict[str, Any]:
    """FVU against L0 of every SAE, variants told apart by colour and shape."""
    known = [row for row in rows if row.fvu is not None and row.l0 is not None]
    variants = list(dict.fromkeys(row.variant or "unknown" for row in known))
    values = [
        {
            "SAE": row.name, "variant": row.variant or "unknown", "L0": row.l0, "FVU": row.fvu, "d_sae": row.d_sae,
            "tokens": row.n_tokens,
        }
        for row in known
    ]  # fmt: skip
    legend = {"orient": "bottom", "columns": 2, "title": None, "labelLimit": 150}
    numbers = [i % MAX_CURVES for i in range(len(variants))]
    colour = {"domain": variants, "range": [COLOURS[i] for i in numbers]}
    shape = {"domain": variants, "range": [_SHAPES[i] for i in numbers]}
    l0 = [row.l0 for row in known if row.l0]
    wide = bool(l0) and max(l0) > 20 * min(l0)
    return {
        "data": {"values": values},
        "height": 300,
        "mark": {"type": "point", "filled": True, "size": 110, "opacity": 0.9},
        "encoding": {
            "x": {
                "field": "L0", "type": "quantitative", "title": "L0 (features per token)",
                "scale": {"type": "log"} if wide else {"zero": False, "padding": 20},
                "axis": {"tickCount": 5, "labelFlush": True},
            },
            "y": {"field": "FVU", "type": "quantitative", "title": "FVU", "scale": {"zero": False, "padding": 20}},
            "color": {"field": "variant", "type": "nominal", "scale": colour, "legend": legend},
            "shape": {"field": "variant", "type": "nominal", "scale": shape, "legend": legend},
            "tooltip": [
                {"field": "SAE", "type": "nominal"}, {"field": "variant", "type": "nominal"},
                {"field": "FVU", "type": "quantitative", "format": ".4f"},
                {"field": "L0", "type": "quantitative", "format": ",.1f"},
                {"field": "d_sae", "type": "quantitative", "format": ","},
                {"field": "tokens", "type": "quantitative", "format": ",", "title": "scored tokens"},
            ],
        },
    }  # fmt: skip
