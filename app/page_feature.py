"""Feature page: one feature's label, metrics, examples of every kind, histogram, effect, and what is near it."""

from __future__ import annotations

import streamlit as st

from saelab.app import (
    as_python,
    feature_effect,
    feature_examples,
    feature_notes,
    interacting,
    markdown,
    query,
    related,
    state,
    url,
)
from saelab.app.dead_reasons import show_reason
from saelab.features import Feature
from saelab.features.render import cosine, feature_histogram_html, number, percent, signs_text
from saelab.features.steer_scores import steer_text
from saelab.features.visible import escape


def show() -> None:
    """Render the page."""
    store = state.store()
    index = url.integer("feature", state.default_feature(store), 0, store.d_sae - 1)
    st.session_state["feature"] = index
    feature = store.feature(index)
    asked = query.from_url(store)
    label = feature.label
    state.page_title(f"Feature {index}{f': {label}' if label else ''}")
    st.title(f"Feature {index}")
    st.html(f'<p class="sa-sub sa-label"><bdi>{escape(label or "never fired")}</bdi></p>')
    _navigation(feature, asked)
    _numbers(feature)
    if signs := signs_text(feature):
        st.info(markdown.plain(signs), icon=":material/swap_horiz:")
    if not feature.n_fired:
        st.info(
            f"This feature did not fire on any of the {state.counted(store)}, so it has no examples.",
            icon=":material/bedtime:",
        )
        show_reason(store, index)
    with st.container(key="sl-marks"):  # within it, a token that is pointed at marks its bin in the histogram
        left, right = st.columns([5, 3], gap="large")
    with left:
        feature_examples.show(feature)
    with right:
        _beside(feature, asked)
    as_python.offer(
        f"feature = store.feature({index})",
        f"examples = feature.examples(kind={st.query_params.get('kind', 'top')!r})",
        f"neighbours = feature.neighbours(by={st.query_params.get('by', 'decoder')!r}, k=8)",
        f"together = store.coactivation({index}, 8)",
        "feature  # in a notebook: a card",
        store=store,
    )


def _beside(feature: Feature, asked: query.Query) -> None:
    """What stands beside the examples."""
    feature_notes.show(feature)
    _values(feature)
    feature_effect.show(feature)
    feature_effect.show_shares(feature)
    with state.friendly_errors():
        related.show(feature, asked.parameters())
        interacting.show(feature, asked.parameters())
    feature_effect.show_promoted(feature)


def _navigation(feature: Feature, asked: query.Query) -> None:
    """Previous and Next follow the search or order that the table was left with."""
    store, index = feature.store, feature.feature
    order = query.ids(store, asked)
    here = order.index(index) if index in order else None
    before = order[here - 1] if here else (index - 1 if here is None and index else None)
    after = (index + 1 if index < store.d_sae - 1 else None) if here is None else None
    if here is not None and here + 1 < len(order):
        after = order[here + 1]
    with st.container(key="sl-step", horizontal=True, vertical_alignment="bottom"):
        url.go_button("Previous", ":material/chevron_left:", "Left", disabled=before is None, feature=before)
        url.go_button("Next", ":material/chevron_right:", "Right", disabled=after is None, feature=after)
        st.number_input("Go to", 0, store.d_sae - 1, step=1, width=130, **url.bound("feature", index))
        state.link("prompt", "Try it on a text", ":material/edit_note:", feature=index)
        state.link("steer", "Steer with it", ":material/tune:", feature=index)
        state.link("features", "All features", ":material/table_rows:", **asked.parameters())
        state.download(f"feature-{index}", [index])
    if here is not None and asked.parameters():
        st.caption(f"{here + 1:,} of {len(order):,} in this view; the left and right arrow keys step through it.")


def _numbers(feature: Feature) -> None:
    values = "magnitudes at its dominant end" if feature.store.signed else "activations"
    bits = "\u2013" if feature.sharpness is None else f"{feature.sharpness:.1f} bits"
    entries = [
        ("Density", percent(feature.density), "Share of counted tokens on which the feature fires."),
        ("Fired on", f"{feature.n_fired:,}", f"Tokens, out of {feature.store.n_tokens:,} counted."),
        ("Sharpness", bits, "What its firing says about the word it fires on, measured on a sample of its peaks."),
        ("p99", number(feature.p99), f"99th percentile of the non-zero {values}: the unit of steering strengths."),
        ("Max", number(feature.max), f"Maximum of the {values}."),
        ("Enc\u2013dec cosine", cosine(feature.cosine), "Cosine similarity of the feature's encoder and decoder rows."),
    ]
    with st.container(horizontal=True):
        for name, value, meaning in entries:
            st.metric(name, value, help=meaning, width=150)
    if steers := steer_text(feature.store.annotations, feature.feature):
        st.caption(steers)


def _values(feature: Feature) -> None:
    st.subheader("Activations")
    st.html(feature_histogram_html(feature))
