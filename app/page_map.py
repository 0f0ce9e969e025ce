"""Map page: the features as points in the plane, near each other where their decoder rows are; a lasso makes a list of them."""

from __future__ import annotations

import re
from urllib.parse import urlencode

import numpy as np
import streamlit as st

from saelab.app import as_python, markdown, scatter, state, url
from saelab.app.feature_rows import show_rows
from saelab.errors import StoreError
from saelab.features import FeatureStore
from saelab.features.layout import MAX_CORNERS, Layout, read_layout
from saelab.features.render import number, percent
from saelab.features.schema import DATABASE
from saelab.features.visible import visible

NEAR, MAX_LIST = 50, 60
_SHOWN = 80
"""Characters of a label in the tooltip."""
_COLOURS = {"density": "Density", "sharpness": "Sharpness", "p99": "p99"}
_METHODS = {
    "tsne": "t-SNE of the decoder rows: near features point in similar directions; distances between groups mean nothing.",
    "pca": "The first two principal components of the decoder rows, which separate little. `pip install 'saelab[map]'` and "
    "`saelab map RUN` make a map by t-SNE, in which similar features stand together.",
}


def show() -> None:
    """Render the page."""
    store = state.store()
    st.title("Map")
    layout = _layout(store, _version(store))
    lines = ("from saelab.features.layout import read_layout", "", "xy = read_layout(store).xy  # one row per feature")
    as_python.offer(*lines, store=store)
    lists = sorted(store.lists)
    colours = [name for name in _COLOURS if name != "sharpness" or store.manifest["version"] >= 3]
    colour = url.choice("colour", "density", colours)
    among = url.choice("list", "", ["", *lists])
    near = url.integer("near", -1, 0, store.d_sae - 1)
    corners = _corners()
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        st.segmented_control(
            "Colour", colours, format_func=_COLOURS.__getitem__, required=True, wrap=True, **url.bound("colour", colour)
        )
        if lists:
            st.selectbox(
                "Mark a list", ["", *lists], format_func=lambda name: name or "None", width=200,
                **url.bound("list", among),
            )  # fmt: skip
        st.number_input(
            f"Choose the {NEAR} around feature", 0, store.d_sae - 1, step=1, value=None, width=220,
            placeholder="Number", **url.bound("near", near if near >= 0 else None),
        )  # fmt: skip
    st.caption(
        f"{_METHODS[layout.method]} Point at a feature for its label, click to open it, draw around features to choose them; "
        "Shift and drag moves the map, Ctrl and the wheel zoom."
    )
    event = scatter.show(_points(store, layout, colour, among, corners), "map")
    _follow(event)
    chosen = layout.inside(corners) if corners else layout.nearest(near, NEAR) if near >= 0 else None
    _selection(store, None if chosen is None else chosen.tolist())


def _version(store: FeatureStore) -> str:
    made = sorted(path.stat().st_mtime_ns for path in store.folder.glob("layout-*.safetensors"))
    return f"{store.manifest['files'][DATABASE]['sha256']} {made}"


@st.cache_resource(max_entries=4, show_spinner="Placing features")
def _layout(_store: FeatureStore, version: str) -> Layout:
    return read_layout(_store)


def _corners() -> list[tuple[float, float]]:
    """The polygon in the URL: x and y of each corner in turn, separated by commas; a notice for what is none."""
    text = st.query_params.get("lasso")
    if text is None:
        return []
    values = text.split(",") if re.fullmatch(r"(-?\d{1,3}(\.\d{1,6})?,?){6,200}", text) else []
    if len(values) % 2 or not 6 <= len(values) <= 2 * MAX_CORNERS or not all(values):
        return url.refused("lasso", text, "numbers x,y,x,y ... of 3 to 64 corners", [])
    numbers = [float(value) for value in values]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _points(store: FeatureStore, layout: Layout, colour: str, among: str, corners: list[tuple[float, float]]) -> bytes:
    here = np.flatnonzero(~np.isnan(layout.xy[:, 0]))
    values = store.column(colour)[here]
    logs = np.log10(np.maximum(values, 1e-12)) if colour != "sharpness" else values
    shade = scatter.shades(logs)
    shade[np.isin(here, store.lists.get(among, []))] = scatter.LISTED
    known = values[np.isfinite(values)]
    shown = percent if colour == "density" else number
    low, high = (shown(float(value)) for value in np.percentile(known, [1, 99])) if len(known) else ("\u2013", "\u2013")
    legend = [f"{_COLOURS[colour]} {low}", high + (f"; squares: {among[:MAX_LIST]}" if among else "")]
    alt = f"Map of {len(here):,} features that fired, coloured by {_COLOURS[colour].lower()}; the table below has those chosen."
    labels, address = _labels(store), "feature?" + urlencode({**state.sae_parameter(), "feature": ""})
    return scatter.packed(
        layout.xy[here],
        shade,
        here.tolist(),
        [labels[i] for i in here.tolist()],
        lasso=corners,
        legend=legend,
        alt=alt,
        address=address,
    )


def _labels(store: FeatureStore) -> list[str]:
    given = store.labels
    found = _found_labels(store, store.manifest["files"][DATABASE]["sha256"])
    return [visible(given[i])[:_SHOWN] if i in given else text for i, text in enumerate(found)]


@st.cache_resource(max_entries=4, show_spinner=False)
def _found_labels(_store: FeatureStore, version: str) -> list[str]:
    rows = _store.table("feature", False, limit=_store.d_sae)
    return [visible(row["label"] or "")[:_SHOWN] for row in rows]


def _follow(event: object) -> None:
    """Choose what is inside the lasso, through the URL."""
    lasso = getattr(event, "lasso", None)
    if isinstance(lasso, list) and 3 <= len(lasso) <= MAX_CORNERS:
        st.query_params["lasso"] = ",".join(f"{float(value):g}" for corner in lasso for value in corner)
        for name in ("near", "page"):
            st.query_params.pop(name, None)
        st.rerun()


def _selection(store: FeatureStore, chosen: list[int] | None) -> None:
    st.subheader("Chosen features")
    if not chosen:
        st.caption(
            "None yet: draw around some, or give the number of a feature above." if chosen is None else "None here."
        )
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.text_input("Name of a list", max_chars=MAX_LIST, key="new_list", width=260)
        if st.button(
            f"Add these {len(chosen):,} to the list", icon=":material/playlist_add:", disabled=not name.strip()
        ):
            _add(store, chosen, name.strip())
    with url.page_of(len(chosen)) as here:
        show_rows(store, store.rows_of(chosen[here]))


def _add(store: FeatureStore, chosen: list[int], name: str) -> None:
    try:
        store.annotations.add_all(chosen, "list", True, name)
    except StoreError as error:
        st.error(markdown.plain(str(error)), icon=":material/error:")
        return
    st.toast(f"{len(chosen):,} features are in the list {markdown.plain(name)}.")
    state.link("features", "Open the list", ":material/table_rows:", list=name, show="all")
