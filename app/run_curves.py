"""The training curves of the chosen SAEs over each other, drawn again every two seconds while one of them is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from saelab.app import url
from saelab.app.curves import MAX_CURVES, QUANTITIES, line_sample, overlay
from saelab.features.visible import escape
from saelab.run_folder import training
from saelab.run_folder.curves import METRICS, Training, curve, read_metrics
from saelab.runs import SaeRun

_EVERY = {"running": 2.0, "stopped": 10.0, "ended": math.inf}
"""Seconds after which the curves are drawn again, by the state of training."""
_SEPARATOR = ","


def show(found: Sequence[SaeRun]) -> None:
    """The curves, with a choice of quantity and of SAEs; both are in the URL."""
    st.subheader("Training", divider="gray")
    key = url.choice("curve", "fvu", list(QUANTITIES))
    st.segmented_control(
        "Quantity", list(QUANTITIES), format_func=lambda one: QUANTITIES[one].title, required=True, wrap=True,
        help="  \n".join(f"**{one.title}**: {one.meaning}" for one in QUANTITIES.values()), **url.bound("curve", key),
    )  # fmt: skip
    shown = _chosen(found)
    before = {sae.name: training(sae).state for sae in shown}
    seconds = min(_EVERY[found] for found in before.values())
    st.fragment(_draw, run_every=seconds if seconds < math.inf else None)(shown, key, before)


def _chosen(found: Sequence[SaeRun]) -> list[SaeRun]:
    """The SAEs that the URL names, else the first ones; a name that is no SAE's shows a notice."""
    names = [sae.name for sae in found]
    default = names[:MAX_CURVES]
    if len(found) == 1:
        return list(found)
    asked = st.query_params.get("curves", "").split(_SEPARATOR)
    chosen = [name for name in names if name in asked][:MAX_CURVES]
    if "curves" in st.query_params and len(chosen) != len(asked):
        chosen = []
        url.choice("curves", "", [_SEPARATOR.join(default)])
    chosen = chosen or default
    st.session_state["curves_box"] = chosen
    st.multiselect(
        "SAEs",
        names,
        key="curves_box",
        max_selections=MAX_CURVES,
        on_change=_choose,
        placeholder="Choose SAEs",
        wrap=True,
    )
    return [sae for sae in found if sae.name in chosen]


def _choose() -> None:
    chosen = st.session_state["curves_box"]
    if chosen:
        st.query_params["curves"] = _SEPARATOR.join(chosen)
    else:
        st.query_params.pop("curves", None)


def _draw(shown: Sequence[SaeRun], key: str, before: dict[str, str]) -> None:
    states = {sae.name: training(sae) for sae in shown}
    if any(found.state != before[name] for name, found in states.items()):
        st.rerun()  # the whole page: what was trained may be there now
    curves = {sae.name: curve(_points(sae), key) for sae in shown}
    curves = {name: points for name, points in curves.items() if points}
    st.html(_legend(states, curves, key))
    if not any(len(points) > 1 for points in curves.values()):
        st.caption("No training curve: metrics.jsonl holds fewer than two points.")
        return
    title = QUANTITIES[key].title
    ends = "; ".join(f"{name}: {points[-1][1]:.4g} after {points[-1][0]:,} tokens" for name, points in curves.items())
    st.vega_lite_chart(overlay(curves, key), alt=f"{title} over training tokens. At the end {ends}", key=f"curve_{key}")


def _points(sae: SaeRun) -> list[dict[str, Any]]:
    path = sae.sae_dir / METRICS
    if not path.exists():
        return []
    status = path.stat()
    return _read(str(path), status.st_mtime_ns, status.st_size)


@st.cache_data(max_entries=64, show_spinner=False)
def _read(path: str, changed: int, size: int) -> list[dict[str, Any]]:
    return read_metrics(Path(path))


def _legend(states: dict[str, Training], curves: dict[str, Any], key: str) -> str:
    """Each SAE with its line, the last value, and how its training goes."""
    items = []
    for name, found in states.items():
        sample = line_sample(list(curves).index(name)) if name in curves else ""
        last = f" <b>{_value(curves[name][-1][1], key)}</b>" if name in curves else ""
        items.append(f"<li>{sample}<span>{escape(name)}{last} <small>{escape(_state(found))}</small></span></li>")
    return f'<ul class="sa-legend">{"".join(items)}</ul>'


def _value(value: float, key: str) -> str:
    form = QUANTITIES[key].form
    return f"{value:.2%}" if form.endswith("%") else f"{value:,.4g}"


def _state(found: Training) -> str:
    """How training goes, in words."""
    if found.state == "ended":
        return "ended"
    part = f" at {found.tokens:,} of {found.n_tokens:,} tokens" if found.n_tokens else ""
    if found.state == "stopped":
        return f"stopped{part}: the same command goes on"
    speed = f", {found.tokens_per_second:,.0f} tokens/s" if found.tokens_per_second else ""
    since = f", last line {found.seconds:.0f} s ago" if found.seconds is not None and found.seconds > 10 else ""
    return f"running{part}{speed}{since}"
