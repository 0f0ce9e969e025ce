"""Feature page: one feature's label, metrics, examples of every kind, activation histogram, and what is near it."""

from __future__ import annotations

import streamlit as st

from saelab.app import as_python, charts, feature_notes, query, related, state
from saelab.errors import StoreError
from saelab.features import Feature
from saelab.features.render import cosine, examples_html, feature_examples_html, number, percent, signs_text
from saelab.features.visible import chip_text, escape

_KINDS = {
    "top": ("Strongest", "The strongest example from each document."),
    "quantile": (
        "Quantiles",
        "Four examples from each of five groups of equally many firings, the strongest group first: does it still mean the same?",
    ),
    "uniform": ("Uniform", "A uniform sample of all tokens on which the feature fires."),
    "near_miss": ("Near misses", "Tokens on which it nearly fired; the number is what it lacked, in units of the SAE."),
}


def show() -> None:
    """Render the page."""
    store = state.store()
    index = state.url_int("feature", state.default_feature(store), 0, store.d_sae - 1)
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
        st.info(state.plain(signs), icon=":material/swap_horiz:")
    if not feature.n_fired:
        st.info(
            f"This feature did not fire on any of the {state.counted(store)}, so it has no examples.",
            icon=":material/bedtime:",
        )
    left, right = st.columns([5, 3], gap="large")
    with left:
        _examples(feature)
    with right:
        feature_notes.show(feature)
        _values(feature)
        with state.friendly_errors():
            related.show(feature, asked.parameters())
        _logits(feature)
    as_python.offer(
        f"feature = store.feature({index})",
        f"examples = feature.examples(kind={st.query_params.get('kind', 'top')!r})",
        f"neighbours = feature.neighbours(by={st.query_params.get('by', 'decoder')!r}, k=8)",
        f"together = store.coactivation({index}, 8)",
        "feature  # in a notebook: a card",
        store=store,
    )


def _navigation(feature: Feature, asked: query.Query) -> None:
    """Previous and Next follow the search or order that the table was left with."""
    store, index = feature.store, feature.feature
    order = query.ids(store, asked)
    here = order.index(index) if index in order else None
    before = order[here - 1] if here else (index - 1 if here is None and index else None)
    after = (index + 1 if index < store.d_sae - 1 else None) if here is None else None
    if here is not None and here + 1 < len(order):
        after = order[here + 1]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        state.go_button("Previous", ":material/chevron_left:", "Left", disabled=before is None, feature=before)
        state.go_button("Next", ":material/chevron_right:", "Right", disabled=after is None, feature=after)
        st.number_input("Go to", 0, store.d_sae - 1, step=1, width=130, **state.bound("feature", index))
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


def _examples(feature: Feature) -> None:
    st.subheader("Examples")
    kind = state.url_choice("kind", "top", list(_KINDS))
    names = {key: name for key, (name, _) in _KINDS.items()}
    st.segmented_control(
        "Which", list(_KINDS), format_func=names.__getitem__, required=True, label_visibility="collapsed",
        **state.bound("kind", kind),
    )  # fmt: skip
    signs = " of that sign (blue: negative)" if feature.store.signed else ""
    st.caption(
        f"{_KINDS[kind][1]} Background: activation relative to the feature's maximum{signs}; outline: the peak. Point at a "
        "token, or move to it with Tab, for its activation. Under the number: document, and the token's place in it."
    )
    if kind == "top":
        st.html(feature_examples_html(feature))
        if len(feature.ends) > 1:
            st.subheader(f"The other end ({feature.ends[1].name})")
            st.html(feature_examples_html(feature, kind="bottom"))
        return
    try:
        st.html(examples_html(feature.examples(20, kind=kind), feature.max, kind=kind))
    except StoreError as error:
        st.info(state.plain(str(error)), icon=":material/update:")


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
    logits = feature.dominant_logits
    with st.expander("Tokens that its decoder row promotes"):
        if not logits.positive:
            st.caption("No direct path from this hook to the logits.")
            return
        end = " towards its negative end" if feature.sign == -1 else ""
        st.caption(
            "The direct effect of the decoder row on the logits, past all later layers: logit change per unit along it"
            f"{end}. In an early or middle layer it says little; what the feature does is measured by steering."
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
