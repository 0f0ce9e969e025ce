"""Features page: the table of all features, searched, sorted, filtered and paged; the whole view is encoded in the URL."""

from __future__ import annotations

import streamlit as st

from saelab.app import as_python, query, state, url
from saelab.app.feature_rows import show_rows
from saelab.features import FeatureStore


def show() -> None:
    """Render the page."""
    store = state.store()
    st.title("Features")
    asked = query.from_url(store)
    _controls(store, asked)
    found = query.found(store, asked)
    features = list(found)
    _summary(store, asked, len(features))
    if not features:
        fix = "Search for other words." if asked.words.strip() else "Choose **All**."
        st.info(f"No feature is found. {fix}", icon=":material/filter_alt_off:")
        return
    with url.page_of(len(features)) as here:
        as_python.offer(query.as_python(asked, url.PER_PAGE, here.start), store=store)
        rows = [row | {"found_in": found[row["feature"]]} for row in store.rows_of(features[here])]
        sort = "" if asked.words.strip() else asked.sort
        show_rows(store, rows, sort, asked.order == "down", asked.parameters())
    if asked.among and not asked.words.strip():
        state.download(asked.among, features)


def _controls(store: FeatureStore, asked: query.Query) -> None:
    st.text_input(
        "Search", max_chars=query.MAX_SEARCH, icon=":material/search:", type="search",
        placeholder='Words of labels, peaks and the text around them; or a token in quotes: " don"',
        **url.bound("q", asked.words),
    )  # fmt: skip
    if asked.words.strip():
        return
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        st.segmented_control(
            "Sort by", query.sorts(store), format_func=lambda key: query.SORTS[key][0], required=True, wrap=True,
            **url.bound("sort", asked.sort),
        )  # fmt: skip
        st.segmented_control(
            "Order", list(query.ORDERS), format_func=query.ORDERS.__getitem__, required=True, wrap=True,
            **url.bound("order", asked.order),
        )  # fmt: skip
        st.segmented_control(
            "Density", query.shows(store), format_func=lambda key: query.SHOWS[key][0], required=True, wrap=True,
            **url.bound("show", asked.show),
        )  # fmt: skip
        if lists := sorted(store.lists):
            st.selectbox(
                "List",
                ["", *lists],
                format_func=lambda name: name or "All features",
                **url.bound("list", asked.among),
            )


def _summary(store: FeatureStore, asked: query.Query, count: int) -> None:
    ends = " (\u2212: mostly negative; magnitudes at that end)" if store.signed else ""
    how = (
        "the best match first."
        if asked.words.strip()
        else f"by {query.SORTS[asked.sort][0].lower()}. {query.SORTS[asked.sort][1]}"
    )
    st.html(
        f'<p class="sa-sub" style="margin-top:.2rem">{count:,} of {store.d_sae:,} features, {how} Measured on '
        f"{state.counted(store)}; p99 and max are over the tokens on which the feature fires{ends}.</p>"
    )
