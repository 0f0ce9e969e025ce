"""Feature page: one feature's metrics, examples with highlighted tokens, activation histogram and logits."""

from __future__ import annotations

import streamlit as st

from saelab.app import charts, state
from saelab.features import Feature
from saelab.features.render import cosine, feature_examples_html, number, percent, signs_text
from saelab.features.visible import chip_text


def show() -> None:
    """Render the page."""
    store = state.store()
    index = state.url_int("feature", state.default_feature(store), 0, store.d_sae - 1)
    st.session_state["feature"] = index
    feature = store.feature(index)
    title, controls = st.columns([2, 3], vertical_alignment="bottom")
    title.title(f"Feature {index}")
    with controls, st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="right"):
        if index > 0:
            state.link("feature", "Previous", ":material/chevron_left:", feature=index - 1)
        if index < store.d_sae - 1:
            state.link("feature", "Next", ":material/chevron_right:", feature=index + 1)
        state.link("steer", "Steer with it", ":material/tune:", feature=index)
        st.number_input("Go to", 0, store.d_sae - 1, step=1, width=130, **state.bound("feature", index))
    _numbers(feature)
    if signs := signs_text(feature):
        st.info(state.plain(signs), icon=":material/swap_horiz:")
    if not feature.n_fired:
        st.info(
            f"This feature did not fire on any of the {state.counted(store)}, so it has no examples.",
            icon=":material/bedtime:",
        )
    left, right = st.columns([5, 3], gap="large")
    with left:
        st.subheader("Top examples")
        signs = " of that sign (blue: negative)" if feature.store.signed else ""
        st.caption(
            f"The strongest example from each document. Background: activation relative to the feature's maximum{signs}; "
            "outline: the peak. Hover over a token, or move to it with Tab, to see its activation."
        )
        st.html(feature_examples_html(feature))
        if len(feature.ends) > 1:
            st.subheader(f"The other end ({feature.ends[1].name})")
            st.html(feature_examples_html(feature, kind="bottom"))
    with right:
        _values(feature)
        _logits(feature)


def _numbers(feature: Feature) -> None:
    values = "magnitudes at its dominant end" if feature.store.signed else "activations"
    entries = [
        ("Density", percent(feature.density), "Share of counted tokens on which the feature fires."),
        ("Fired on", f"{feature.n_fired:,}", f"Tokens, out of {feature.store.n_tokens:,} counted."),
        ("Mean", number(feature.mean), f"Mean of the non-zero {values}."),
        ("p99", number(feature.p99), f"99th percentile of the non-zero {values}: the unit of steering strengths."),
        ("Max", number(feature.max), f"Maximum of the {values}."),
        ("Enc\u2013dec cosine", cosine(feature.cosine), "Cosine similarity of the feature's encoder and decoder rows."),
    ]
    for column, (label, value, meaning) in zip(st.columns(len(entries)), entries, strict=True):
        column.metric(label, value, help=meaning)


def _values(feature: Feature) -> None:
    st.subheader("Activations")
    if not len(feature.histogram.counts):
        st.caption("No activations: the feature never fired.")
        return
    ends = [(end.sign * end.p99, end.sign * end.max) for end in feature.ends]
    figure = charts.value_histogram(feature.histogram, ends)
    alt = f"Histogram of {feature.n_fired:,} non-zero activations, p99 {number(feature.p99)}, max {number(feature.max)}"
    st.plotly_chart(figure, key="values", alt=alt, config={"displayModeBar": False})


def _logits(feature: Feature) -> None:
    st.subheader("Logits")
    logits = feature.dominant_logits
    if not logits.positive:
        st.caption("No direct path from this hook to the logits.")
        return
    end = " towards its negative end" if feature.sign == -1 else ""
    st.caption(
        f"Direct effect of the decoder row with the final norm's gain folded in: logit change per unit along it{end}."
    )
    for column, name, tokens in zip(st.columns(2), ("Promotes", "Suppresses"), logits, strict=True):
        column.html(f'<div class="sa-head">{name}</div>{_logit_rows(tokens)}')


def _logit_rows(tokens: list[tuple[str, float]]) -> str:
    rows = "".join(
        f'<span class="sa-clip"><bdi class="sa-chip">{chip_text(text)}</bdi></span>'
        f'<span class="sa-num">{value:+.2f}</span>'
        for text, value in tokens
    )
    return f'<div class="sa-logits" style="margin-top:.4rem">{rows}</div>'
