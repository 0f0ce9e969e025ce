"""Prompt page: which features fire on a text of one's own, and where one of them does."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import streamlit as st

from saelab.app import as_python, markdown, state, url
from saelab.app.feature_rows import DASH
from saelab.features import FeatureStore
from saelab.features.collected_with import model_names
from saelab.features.records import Example
from saelab.features.render import examples_html
from saelab.features.text_size import MAX_CHARACTERS, bounded_ids, check_text
from saelab.features.token_text import display_groups
from saelab.features.visible import chip_text, escape

_PER_TOKEN, _IN_ALL, _LABEL = 5, 16, 40
_ORDERS = {"surprise": "Standing out", "value": "Largest"}
_DEFAULT = "The storm broke over the harbour, and the moon went out like a candle."


def show() -> None:
    """Render the page."""
    store = state.store()
    st.title("Prompt")
    state.show_purpose(store, "What the features read in a text of yours.")
    index = url.integer("feature", -1, -1, store.d_sae - 1)
    by = url.choice("by", "surprise", list(_ORDERS))
    with st.form("prompt", border=False):
        text = st.text_area("Text", max_chars=MAX_CHARACTERS, key=url.text_box_key("text", _DEFAULT, MAX_CHARACTERS))
        pressed = st.form_submit_button("Read", type="primary", icon=":material/play_arrow:")
    along = [f"values = reading.of({index})"] if index >= 0 else []
    as_python.offer(
        "from saelab.features.reading import read_text",
        "",
        f"reading = read_text(store, lm, {text!r})",
        f"top = reading.top({_PER_TOKEN}, by={by!r})  # for each token",
        *along,
        store=store,
        models=model_names(store),
    )
    if pressed:
        url.keep_texts({"text": text})
        with state.friendly_errors():
            st.session_state["reading"] = (store.folder, _read(store, text))
    folder, reading = st.session_state.get("reading", (None, None))
    if reading is None or folder != store.folder:
        return
    if index >= 0:
        _one(store, reading, index)
    st.segmented_control(
        "Order", list(_ORDERS), format_func=_ORDERS.__getitem__, required=True, wrap=True,
        help="Standing out: the share of the feature's firings that are weaker, times its rarity (-log10 of its density).",
        **url.bound("by", by),
    )  # fmt: skip
    _overall(store, reading, reading.best(_IN_ALL, by=by))
    _tokens(store, reading, by)


def _read(store: FeatureStore, text: str) -> Any:
    """Run the text. Raises `ValueError` naming what is wrong with it."""
    check_text(text)
    from saelab.features.reading import read_text

    with st.spinner("Reading ..."), state.MODEL_LOCK:
        lm = state.load_models(store)
        return read_text(store, lm, bounded_ids(lm, text))


def _one(store: FeatureStore, reading: Any, index: int) -> None:
    """The text with one feature's activations."""
    values = reading.of(index)
    feature = store.feature(index)
    st.subheader(f"Feature {index} along the text")
    st.caption(
        f"{feature.label or 'never fired'}; largest here {max(values):.2f}, on the held-out text {feature.max or 0:.2f}."
    )
    peak = max(range(len(values)), key=lambda i: abs(values[i]))
    shown = Example(values[peak], 0, 0, peak, tuple(reading.token_ids), tuple(reading.pieces), tuple(values), peak)
    st.html(examples_html([shown], feature.max or max(values)))


def _overall(store: FeatureStore, reading: Any, best: list[dict[str, Any]]) -> None:
    """The features that stand out most anywhere in the text, as links."""
    st.subheader("In the whole text")
    labels = store.labels
    rows = {row["feature"]: row for row in store.rows_of([one["feature"] for one in best])}
    pieces = display_groups(reading.pieces)
    with st.container(horizontal=True):
        for one in best:
            feature = one["feature"]
            label = _short(labels.get(feature) or rows[feature]["label"])
            token = next(group.text for group in pieces if group.start <= one["position"] < group.stop).strip()
            state.link("feature", markdown.plain(f"{feature} {label} ({one['value']:.1f} on {token})"), feature=feature)


def _tokens(store: FeatureStore, reading: Any, by: str) -> None:
    """Each token with its features and the share of it that the SAE explains."""
    st.subheader("Token by token")
    st.caption(
        "Beside each token: the share of its variance that the SAE explains; then its features with their activations. The first "
        "token of a text is unlike all others, and SAEs are not trained on it."
    )
    top = reading.top(_PER_TOKEN, by=by)
    labels = store.labels
    rows = {row["feature"]: row for row in store.rows_of(sorted({one["feature"] for token in top for one in token}))}
    lines = []
    for group in display_groups(reading.pieces):
        token = group.stop - 1
        found = "".join(_pill(one, labels.get(one["feature"]) or rows[one["feature"]]["label"]) for one in top[token])
        explained = f'<small title="explained variance">{max(float(reading.explained[token]), 0):.0%}</small>'
        dim = ' class="sa-dim"' if group.start == 0 else ""
        lines.append(f"<dt{dim}><bdi>{chip_text(group.text)}</bdi> {explained}</dt><dd{dim}>{found or DASH}</dd>")
    st.html(f'<dl class="sa-tokens">{"".join(lines)}</dl>')


def _pill(one: dict[str, Any], label: str | None) -> str:
    address = escape("feature?" + urlencode({"feature": one["feature"], **state.sae_parameter()}))
    title = escape(f"activation {one['value']:.2f}, above {one['percentile']:.0%} of its firings")
    text = escape(_short(label))
    return (
        f'<span class="sa-pill" title="{title}"><a href="{address}" target="_self">{one["feature"]}</a> '
        f"<bdi>{text}</bdi> <small>{one['value']:.1f}</small></span>"
    )


def _short(label: str | None) -> str:
    return label or "" if len(label or "") <= _LABEL else f"{(label or '')[:_LABEL]}\u2026"
