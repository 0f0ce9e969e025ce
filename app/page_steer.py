"""Steer page: add a feature to the model's activations and compare unsteered and steered text from the same seed.

Every setting is in the address. Enter in a box applies it, as everywhere in the dashboard; only the button generates.
"""

from __future__ import annotations

from typing import Any

import streamlit as st

from saelab.app import as_python, markdown, state, steered_text, url
from saelab.app.steered_text import MAX_PROMPT, MAX_STRENGTH, MAX_TOKENS, signed
from saelab.features import End, Feature, FeatureStore
from saelab.features.render import feature_examples_html, model_label

MAX_TEMPERATURE, MAX_SEED, MAX_PROMPT_IN_URL = 5.0, 2**31 - 1, 500
_PROMPT = "The weather today"


def show() -> None:
    """Render the page."""
    store = state.store()
    st.title("Steer")
    with st.container(key="sa-stack-steer"):
        left, right = st.columns([2, 3], gap="large")
    with left:
        feature, request = _controls(store)
        pressed = st.button("Generate", type="primary", icon=":material/play_arrow:")
        if len(request["prompt"]) > MAX_PROMPT_IN_URL:
            st.caption(f"A prompt of more than {MAX_PROMPT_IN_URL} characters is not kept in the address.")
        model = markdown.plain(model_label(store.manifest["model"]["name"]))
        st.caption(f"The first run loads {model}; it stays in memory until the dashboard stops.")
    state.page_title(f"Steer with feature {feature.feature}")
    as_python.offer(*steered_text.as_python(request), store=store, model=True)
    with right:
        box = st.empty()
        if pressed:
            st.session_state.pop("steered", None)  # after an error, nothing old stands beside the message
            with box.container(), state.friendly_errors():
                st.session_state["steered"] = steered_text.generate(store, feature, request)
        if result := st.session_state.get("steered"):
            with box.container():
                steered_text.show_result(result, request, store)
        st.subheader(f"Feature {feature.feature} fires on")
        st.html(feature_examples_html(feature, 3))
        if len(feature.ends) > 1:
            st.subheader(f"and at its {feature.ends[1].name} end on")
            st.html(feature_examples_html(feature, 3, "bottom"))


def _controls(store: FeatureStore) -> tuple[Feature, dict[str, Any]]:
    """The chosen feature, and what to generate with it."""
    index = url.integer("feature", state.default_feature(store), 0, store.d_sae - 1)
    st.session_state["feature"] = index
    feature, strength = store.feature(index), url.real("strength", 2.0, -MAX_STRENGTH, MAX_STRENGTH)
    tokens, seed = url.integer("tokens", 40, 1, MAX_TOKENS), url.integer("seed", 0, 0, MAX_SEED)
    temperature, prompt = url.real("temperature", 0.0, 0.0, MAX_TEMPERATURE), _prompt()
    with st.container(horizontal=True):
        st.number_input("Feature", 0, store.d_sae - 1, step=1, width=150, **url.bound("feature", index))
        st.number_input(
            "Strength (\u00d7 p99)", -MAX_STRENGTH, MAX_STRENGTH, step=0.5, format="%g", width=150,
            **url.bound("strength", strength),
        )  # fmt: skip
    end = _choose_end(feature)
    if end is not None:
        st.caption(
            f"{signed(strength)} \u00d7 p99 = {signed(strength * end.sign * end.p99)}; the feature's own "
            f"{'maximum' if end.sign > 0 else 'minimum'} is {signed(end.sign * end.max)}."
        )
    st.session_state["box_prompt"] = prompt
    st.text_area("Prompt", max_chars=MAX_PROMPT, height=110, key="box_prompt", on_change=_write_prompt)
    with st.container(horizontal=True):
        st.number_input("New tokens", 1, MAX_TOKENS, step=1, width=120, **url.bound("tokens", tokens))
        st.number_input(
            "Temperature", 0.0, MAX_TEMPERATURE, step=0.1, format="%g", width=120,
            help="0 always takes the most likely token.", **url.bound("temperature", temperature),
        )  # fmt: skip
        st.number_input("Seed", 0, MAX_SEED, step=1, width=120, **url.bound("seed", seed))
    request = {"feature": index, "end": end.name if end else "", "strength": strength, "prompt": prompt}
    return feature, request | {"max_new_tokens": tokens, "temperature": temperature, "seed": seed}


def _prompt() -> str:
    """The prompt in the URL, else a longer one that this session wrote, else the default."""
    text = st.query_params.get("prompt")
    if text is not None and len(text) > MAX_PROMPT_IN_URL:
        url.notice("prompt", text, f"at most {MAX_PROMPT_IN_URL} characters", _PROMPT)
        return _PROMPT
    return st.session_state.get("long_prompt", _PROMPT) if text is None else text


def _write_prompt() -> None:
    text = st.session_state["box_prompt"]
    if len(text) > MAX_PROMPT_IN_URL:
        st.session_state["long_prompt"] = text
        st.query_params.pop("prompt", None)
    else:
        st.session_state.pop("long_prompt", None)
        st.query_params["prompt"] = text


def _choose_end(feature: Feature) -> End | None:
    """The end that positive strengths steer towards, chosen by the user where there are two; None for a feature with no ends."""
    if len(feature.ends) < 2:
        return feature.ends[0] if feature.ends else None
    ends = {end.name: end for end in feature.ends}
    chosen = url.choice("end", feature.ends[0].name, list(ends))
    st.segmented_control(
        "Towards its end", list(ends), format_func=str.capitalize, required=True, wrap=True, **url.bound("end", chosen)
    )
    return ends[chosen]
