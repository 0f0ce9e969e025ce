"""Effect against cost of what the Steer page wrote at several strengths: drawn by Plotly, as the page shows no SVG of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st


def show(series: Mapping[str, Sequence[Any]]) -> None:
    """One line for what is steered and one for the control; strengths stand beside the points of the first."""
    import plotly.graph_objects as go

    from saelab.app.charts import BLUE, VERMILLION, finish
    from saelab.steering.compare_html import COST, EFFECT

    figure = go.Figure()
    looks = ((BLUE, "circle", "solid"), (VERMILLION, "square", "dash"))
    for i, ((name, points), (colour, symbol, dash)) in enumerate(zip(series.items(), looks, strict=False)):
        figure.add_scatter(
            x=[one.cost for one in points], y=[one.effect for one in points], name=name, text=[one.name for one in points],
            mode="lines+markers+text" if i == 0 else "lines+markers", textposition="top left",
            marker={"color": colour, "symbol": symbol, "size": 9}, line={"color": colour, "dash": dash},
            hovertemplate="%{text}<br>cost %{x:.2f}, read back %{y:+.2f}<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title=COST)
    figure.update_yaxes(title=EFFECT)
    finish(figure, 300)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.14, "x": 0})
    figure.update_yaxes(zeroline=True, zerolinecolor="rgba(128,128,128,.6)")
    st.plotly_chart(figure, key="steer_effect")
