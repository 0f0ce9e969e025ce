"""Plotly charts of the dashboard as pure functions of the data, without Streamlit. Okabe-Ito colours, backed up by patterns.

Those of the first page are in `curves.py`: it should not wait for 5 MB of scripts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from saelab.features.records import Histogram

BLUE, VERMILLION = "#0072b2", "#d55e00"
_FAINT = "rgba(128,128,128,.25)"
_MAX_POINTS = 1500  # per trace: points are drawn as SVG, because WebGL would need a policy that allows eval


def value_histogram(histogram: Histogram, ends: Sequence[tuple[float, float]] = ()) -> go.Figure:
    """Histogram of a feature's non-zero activations in log bins. Negative values are hatched and left of a gap; lines mark
    the p99 and the maximum of each end."""
    edges, counts = histogram.edges, histogram.counts
    positions = _log_positions(edges, edges)
    hover = [f"{low:.3g} to {high:.3g}<br>{n:,} tokens" for low, high, n in zip(edges, edges[1:], counts, strict=False)]
    hatching = {
        "shape": ["/" if high <= 0 else "" for high in edges[1:]],
        "fillmode": "overlay",
        "fgcolor": "white",
        "size": 5,
    }
    figure = go.Figure(
        go.Bar(
            x=(positions[:-1] + positions[1:]) / 2, y=counts, width=np.diff(positions) * 0.94, marker_color=BLUE,
            hovertext=hover, hoverinfo="text", marker_pattern=hatching,
        )
    )  # fmt: skip
    for end in ends:
        for name, value, dash in zip(
            ("p99", "max"), _log_positions(np.array(end), edges), ("dash", "dot"), strict=True
        ):
            figure.add_vline(
                x=float(value), line={"dash": dash, "width": 1.5, "color": VERMILLION},
                annotation={"text": name, "yref": "paper", "y": 1.1 if name == "p99" else 1.0, "font": {"size": 11}},
            )  # fmt: skip
    values, labels = _signed_ticks(edges)
    figure.update_xaxes(title="activation (log scale)", tickvals=values, ticktext=labels)
    figure.update_yaxes(title="tokens")
    return finish(figure, 250)


def _log_positions(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Positions of values on an axis of log magnitudes. Negative values are mirrored; where `edges` has both signs, a gap of
    a quarter of a decade separates them from the positive ones."""
    both = edges[0] < 0 < edges[-1]
    start = np.log10(np.abs(edges).min()) - 0.125 if both else 0.0
    return np.sign(values) * (np.log10(np.abs(values)) - start)


def _signed_ticks(edges: np.ndarray) -> tuple[list[float], list[str]]:
    values: list[float] = []
    for sign in (-1, 1):
        side = sign * edges[np.sign(edges) == sign]
        if len(side) > 1:
            values += [sign * value for value in _round_numbers(float(side.min()), float(side.max()))]
    return _log_positions(np.array(values), edges).tolist(), [f"{value:g}" for value in values]


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


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 per decade between two positive values; powers of ten alone over more than four decades."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    values = [step * 10.0**decade for decade in decades for step in steps]
    return [value for value in values if low * 0.99 <= value <= high * 1.01]


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else f"10<sup>{exponent}</sup>"


def finish(figure: go.Figure, height: int) -> go.Figure:
    """The height, margins and grid that all figures have."""
    margin = {"l": 8, "r": 8, "t": 22, "b": 8}
    figure.update_layout(height=height, margin=margin, bargap=0.02, showlegend=False)
    figure.update_xaxes(gridcolor=_FAINT, zeroline=False)
    figure.update_yaxes(gridcolor=_FAINT, zeroline=False)
    return figure
