"""Plotly charts of the dashboard as pure functions of the data, without Streamlit. Okabe-Ito colours, backed up by patterns.

Those of the first page are in `curves.py`: it should not wait for 5 MB of scripts.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

BLUE, VERMILLION = "#0072b2", "#d55e00"
_FAINT = "rgba(128,128,128,.25)"
_MAX_POINTS = 1500  # per trace: points are drawn as SVG, because WebGL would need a policy that allows eval


def density_histogram(density: np.ndarray, n_tokens: int) -> go.Figure:
    """Histogram of feature densities on a log scale; features that never fired get a separate hatched bar."""
    fired = density > 0
    logs = np.log10(density[fired]) if fired.any() else np.zeros(0)
    lowest = np.floor(np.log10(1 / max(n_tokens, 10)))
    edges = np.arange(lowest, 0.01, 0.25)
    counts, _ = np.histogram(logs, edges)
    hover = [
        f"{10**low:.1e} to {10 ** (low + 0.25):.1e}<br>{n:,} features" for low, n in zip(edges, counts, strict=False)
    ]
    never = int((~fired).sum())
    figure = go.Figure(
        go.Bar(
            x=edges[:-1] + 0.125,
            y=counts,
            width=0.235,
            marker_color=BLUE,
            hovertext=hover,
            hoverinfo="text",
            name="fire",
        )
    )
    hatched = {"shape": "/", "fillmode": "overlay", "fgcolor": "white", "size": 6}
    figure.add_bar(
        x=[lowest - 0.6], y=[never], width=0.5, name="never fired", hovertext=[f"never fired<br>{never:,} features"],
        hoverinfo="text", marker={"color": VERMILLION, "pattern": hatched},
    )  # fmt: skip
    figure.update_layout(barmode="overlay")  # with "group" the two bars would share one slot
    ticks = list(range(int(lowest), 1))
    figure.update_xaxes(
        title="share of tokens on which the feature fires",
        tickvals=[lowest - 0.6, *ticks], ticktext=["never", *(_power(tick) for tick in ticks)],
    )  # fmt: skip
    figure.update_yaxes(title="features")
    return finish(figure, 280)


def cosine_scatter(density: np.ndarray, cosine: np.ndarray, n_tokens: int, at_most: int) -> go.Figure:
    """Encoder-decoder cosine against density; features that fired at most `at_most` times are diamonds."""
    floor = 0.5 / max(n_tokens, 1)
    rare = density * n_tokens <= at_most + 0.5
    figure = go.Figure()
    for name, here, colour, symbol in (
        ("others", ~rare, BLUE, "circle"),
        (f"fired at most {at_most}\u00d7", rare, VERMILLION, "diamond-open"),
    ):
        ids = np.flatnonzero(here)
        ids = ids[:: -(-len(ids) // _MAX_POINTS) or 1]
        figure.add_trace(
            go.Scatter(
                x=np.maximum(density[ids], floor),
                y=cosine[ids],
                mode="markers",
                name=name,
                customdata=ids,
                marker={"color": colour, "symbol": symbol, "size": 6, "opacity": 0.6},
                hovertemplate="feature %{customdata}<br>density %{x:.2e}<br>cosine %{y:.2f}<extra></extra>",
            )  # fmt: skip
        )
    figure.update_xaxes(type="log", title="density (never: far left)", exponentformat="power", dtick=1)
    figure.update_yaxes(title="encoder\u2013decoder cosine", range=[min(0.0, float(np.nanmin(cosine))) - 0.05, 1.08])
    finish(figure, 280)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.14, "x": 0})
    return figure


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else f"10<sup>{exponent}</sup>"


def finish(figure: go.Figure, height: int) -> go.Figure:
    """The height, margins and grid that all figures have."""
    margin = {"l": 8, "r": 8, "t": 22, "b": 8}
    figure.update_layout(height=height, margin=margin, bargap=0.02, showlegend=False)
    figure.update_xaxes(gridcolor=_FAINT, zeroline=False)
    figure.update_yaxes(gridcolor=_FAINT, zeroline=False)
    return figure
