"""Charts of the Compare page. Two series are told apart by pattern as well as by colour."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from saelab.app.charts import BLUE, VERMILLION, finish
from saelab.diffing.plot import HIGHEST, LOWEST, MARKS
from saelab.diffing.report import DiffReport

_SYMBOLS = ("circle", "square", "triangle-up", "diamond")
_MOST_POINTS = 1500
"""Points are drawn as SVG, because WebGL would need a policy that allows eval."""


def cosines(a: np.ndarray, b: np.ndarray, names: tuple[str, str], same: float) -> go.Figure:
    """Histogram of the best decoder cosine of each feature, for both SAEs; a line where counterparts begin."""
    edges = np.round(np.arange(-0.1, 1.01, 0.05), 2)
    figure = go.Figure()
    for values, name, colour, shape in zip((a, b), names, (BLUE, VERMILLION), ("", "/"), strict=True):
        values = values[~np.isnan(values)].clip(edges[0], 1.0)
        _add_bars(figure, values, edges, name, colour, shape, "cosine")
    figure.add_vline(
        x=same, line={"dash": "dash", "width": 1.5, "color": "#808080"},
        annotation={"text": "counterparts", "yref": "paper", "y": 1.1, "font": {"size": 11}, "xanchor": "right"},
    )  # fmt: skip
    figure.update_xaxes(title="cosine to the most similar decoder row of the other", range=[edges[0], 1.0])
    return _two(figure)


def relative_norms(relative: np.ndarray) -> go.Figure:
    """Histogram of relative decoder norms: 0 only the first source, 1 only the second."""
    figure, edges = go.Figure(), np.round(np.linspace(0, 1, 41), 3)
    _add_bars(figure, relative[~np.isnan(relative)], edges, "features", BLUE, "", "relative norm")
    figure.update_xaxes(title="relative decoder norm: 0 only first, 1 only second", range=[-0.02, 1.02])
    figure.update_yaxes(title="features")
    return finish(figure, 250)


def side_cosines(cosine: np.ndarray, kind: np.ndarray) -> go.Figure:
    """Histogram of the cosine between the two decoder rows, of shared features and of all others."""
    figure, edges = go.Figure(), np.round(np.linspace(-1, 1, 41), 3)
    known = ~np.isnan(cosine)
    for chosen, name, colour, shape in ((kind == 1, "shared", BLUE, ""), (kind != 1, "others", VERMILLION, "/")):
        _add_bars(figure, cosine[chosen & known], edges, name, colour, shape, "cosine")
    figure.update_xaxes(title="cosine between its two decoder rows", range=[-1.02, 1.02])
    return _two(figure)


def nu_against_norm(report: DiffReport) -> go.Figure:
    """nu_error against the relative decoder norm: the features that look specific, by verdict, before all others."""
    figure, marked = go.Figure(), {one.feature for one in report.features}
    cloud = [
        (feature, delta, nu)
        for feature, delta, nu in zip(*(report.cloud[name] for name in ("feature", "delta", "nu_error")), strict=True)
        if feature not in marked
    ]
    groups = [("others", "#808080", "circle", cloud[:: max(1, -(-len(cloud) // _MOST_POINTS))])]
    for (verdict, (colour, _)), symbol in zip(MARKS.items(), _SYMBOLS, strict=True):
        points = [(one.feature, one.delta, one.nu_error.value) for one in report.of(verdict)]
        groups += [(verdict, colour, symbol, points)] if points else []
    for name, colour, symbol, points in groups:
        features, deltas, nus = zip(*points, strict=True) if points else ((), (), ())
        faint = name == "others"
        figure.add_scatter(
            x=deltas, y=np.clip(np.array(nus, dtype=float), LOWEST, HIGHEST), mode="markers", name=name,
            marker={"color": colour, "symbol": symbol, "size": 3 if faint else 9, "opacity": 0.4 if faint else 0.9},
            text=[f"{feature}<br>nu_error {nu:.2f}" for feature, nu in zip(features, nus, strict=True)],
            hovertemplate="feature %{text}, relative norm %{x:.2f}<extra>" + name + "</extra>",
        )  # fmt: skip
    most = report.about["thresholds"]["nu_error"]
    figure.add_hrect(y0=-most, y1=most, fillcolor="#808080", opacity=0.1, line_width=0)
    figure.update_xaxes(title="relative decoder norm: 0 only a, 1 only b", range=[-0.03, 1.03])
    figure.update_yaxes(title="nu_error", range=[LOWEST - 0.05, HIGHEST + 0.05])
    finish(figure, 300)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.16, "x": 0})
    return figure


def _add_bars(
    figure: go.Figure, values: np.ndarray, edges: np.ndarray, name: str, colour: str, shape: str, what: str
) -> None:
    counts, _ = np.histogram(values, edges)
    hover = [
        f"{name}<br>{what} {low:g} to {high:g}<br>{n:,} features"
        for low, high, n in zip(edges, edges[1:], counts, strict=False)
    ]
    pattern = {"shape": shape, "fillmode": "overlay", "fgcolor": "white", "size": 5}
    middle = (edges[1:] + edges[:-1]) / 2
    figure.add_bar(
        x=middle, y=counts, name=name, marker={"color": colour, "pattern": pattern}, hovertext=hover, hoverinfo="text"
    )


def _two(figure: go.Figure) -> go.Figure:
    figure.update_yaxes(title="features")
    finish(figure, 250)
    figure.update_layout(barmode="group", showlegend=True, legend={"orientation": "h", "y": 1.2, "x": 0})
    return figure
