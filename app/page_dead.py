"""Dead features page: features that never or almost never fired, with density and encoder-decoder cosine."""

from __future__ import annotations

import streamlit as st

from saelab.app import as_python, charts, state, url
from saelab.app.dead_reasons import show_reasons
from saelab.app.feature_rows import show_rows
from saelab.features.render import percent

_LIMITS = ["0", "1", "3", "10", "30", "100"]


def show() -> None:
    """Render the page."""
    store = state.store()
    st.title("Dead features")
    st.html(f'<p class="sa-sub">Features that never, or almost never, fired on the {state.counted(store)}.</p>')
    at_most = int(url.choice("fired", "10", _LIMITS))
    never, rare = store.count({"n_fired": (None, 0)}), store.count({"n_fired": (None, at_most)})
    first, second, third, control = st.columns([1, 1, 1, 2], vertical_alignment="center")
    first.metric("Never fired", f"{never:,}", help="No non-zero activation on any counted token.")
    second.metric("Share never fired", percent(never / store.d_sae))
    third.metric(f"Fired at most {at_most}\u00d7", f"{rare:,}")
    control.segmented_control(
        "Count as rare: fired at most", _LIMITS, required=True, **url.bound("fired", str(at_most))
    )
    density, cosine = store.column("density"), store.column("cosine")
    left, right = st.columns(2, gap="large")
    alt = f"Histogram of feature densities; {never:,} of {store.d_sae:,} features never fired"
    left.plotly_chart(charts.density_histogram(density, store.n_tokens), alt=alt, config={"displayModeBar": False})
    right.plotly_chart(
        charts.cosine_scatter(density, cosine, store.n_tokens, at_most),
        alt=f"Encoder\u2013decoder cosine against density; {rare:,} features fired at most {at_most} times",
        config={"displayModeBar": False},
    )
    if not rare:
        st.success(f"Every feature fired more than {at_most} times.", icon=":material/check_circle:")
        return
    with url.page_of(rare) as here:
        where = {"n_fired": (None, at_most)}
        rows = store.table("n_fired", False, where, url.PER_PAGE, here.start)
        as_python.offer(
            f"rows = store.table('n_fired', descending=False, where={where}, limit={url.PER_PAGE}, offset={here.start})",
            "misses = [store.examples(row['feature'], 1, kind='near_miss') for row in rows]",
            store=store,
        )
        show_reasons(store, [row["feature"] for row in rows])
        show_rows(store, rows, "n_fired", descending=False)
