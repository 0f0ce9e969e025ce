"""Features page: the table of all features, sorted, filtered and paged in SQL; the whole view is encoded in the URL."""

from __future__ import annotations

import streamlit as st

from saelab.app import state
from saelab.app.feature_rows import show_rows

PER_PAGE = 25
_SORTS = {
    "density": "Density",
    "p99": "p99",
    "max": "Max",
    "mean": "Mean",
    "cosine": "Cosine",
    "feature": "Index",
}
_ORDERS = {"down": "High to low", "up": "Low to high"}
_SHOWS = {
    "firing": ("Firing", {"n_fired": (1, None)}),
    "common": ("0.01 % to 1 %", {"density": (1e-4, 1e-2)}),
    "dense": ("Over 10 %", {"density": (0.1, None)}),
    "all": ("All", {}),
}


def show() -> None:
    """Render the page."""
    store = state.store()
    st.title("Features")
    sort = state.url_choice("sort", "density", list(_SORTS))
    order = state.url_choice("order", "down", list(_ORDERS))
    shown = state.url_choice("show", "firing", list(_SHOWS))
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        st.segmented_control(
            "Sort by", list(_SORTS), format_func=_SORTS.__getitem__, required=True, **state.bound("sort", sort)
        )
        st.segmented_control(
            "Order", list(_ORDERS), format_func=_ORDERS.__getitem__, required=True, **state.bound("order", order)
        )
        st.segmented_control(
            "Density", list(_SHOWS), format_func=lambda key: _SHOWS[key][0], required=True, **state.bound("show", shown)
        )
    where = _SHOWS[shown][1]
    count = store.count(where)
    ends = " (\u2212: mostly negative; magnitudes at that end)" if store.signed else ""
    st.html(
        f'<p class="sa-sub" style="margin-top:.2rem">{count:,} of {store.d_sae:,} features. Measured on '
        f"{state.counted(store)}; p99 and max are over the tokens on which the feature fires{ends}.</p>"
    )
    if not count:
        st.info("No feature is in this range. Choose **All**.", icon=":material/filter_alt_off:")
        return
    pages = -(-count // PER_PAGE)
    page = state.url_int("page", 1, 1, pages)
    rows = store.table(sort, order == "down", where, limit=PER_PAGE, offset=(page - 1) * PER_PAGE)
    show_rows(store, rows, sort, order == "down")
    state.show_pagination(pages, page)
