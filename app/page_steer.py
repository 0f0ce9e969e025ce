"""Steer page: add a feature to the model's activations and compare default and steered text from the same seed."""

from __future__ import annotations

import math
from typing import Any

import streamlit as st

from saelab.app import state
from saelab.features import End, Feature, FeatureStore
from saelab.features.manifest import SIGNS_MIXED
from saelab.features.render import feature_examples_html, model_label, number
from saelab.features.visible import escape

MAX_PROMPT, MAX_TOKENS, MAX_STRENGTH = 8000, 512, 100.0


def show() -> None:
    """Render the page."""
    store = state.store()
    st.title("Steer")
    model = model_label(store.manifest["model"]["name"])
    left, right = st.columns([2, 3], gap="large")
    with left:
        feature, request = _controls(store)
        st.caption(f"The first run loads {escape(model)}; it stays in memory until the dashboard stops.")
    if request is not None:
        with right, state.friendly_errors():
            st.session_state["steered"] = _generate(store, feature, request)
    with right:
        _result()
        st.subheader(f"Feature {feature.feature} fires on")
        st.html(feature_examples_html(feature, 3))
        if len(feature.ends) > 1:
            st.subheader(f"and at its {feature.ends[1].name} end on")
            st.html(feature_examples_html(feature, 3, "bottom"))


def _controls(store: FeatureStore) -> tuple[Feature, dict[str, Any] | None]:
    """The chosen feature and, if the button was pressed, the request to generate."""
    index = state.url_int("feature", state.default_feature(store), 0, store.d_sae - 1)
    st.session_state["feature"] = index
    strength = state.url_float("strength", 2.0, -MAX_STRENGTH, MAX_STRENGTH)
    first, second = st.columns(2)
    first.number_input("Feature", 0, store.d_sae - 1, step=1, **state.bound("feature", index))
    second.number_input(
        "Strength (\u00d7 p99)", -MAX_STRENGTH, MAX_STRENGTH, step=0.5, format="%g", **state.bound("strength", strength)
    )
    feature = store.feature(index)
    end = _choose_end(feature)
    if end is not None:
        st.caption(
            f"{strength:g} \u00d7 p99 adds {number(strength * end.sign * end.p99)} to an activation whose "
            f"{'maximum' if end.sign > 0 else 'minimum'} is {number(end.sign * end.max)}."
        )
    with st.form("steer", border=False):
        prompt = st.text_area("Prompt", "The weather today", max_chars=MAX_PROMPT, height=110)
        columns = st.columns(3)
        tokens = columns[0].number_input("New tokens", 1, MAX_TOKENS, 40)
        temperature = columns[1].number_input(
            "Temperature", 0.0, 5.0, 0.0, 0.1, help="0 always takes the most likely token."
        )
        seed = columns[2].number_input("Seed", 0, 2**31 - 1, 0)
        pressed = st.form_submit_button("Generate", type="primary", icon=":material/play_arrow:")
    request = {
        "prompt": prompt,
        "strength": strength,
        "end": end.name if end is not None else "",
        "max_new_tokens": tokens,
        "temperature": temperature,
        "seed": seed,
    }
    return feature, request if pressed else None


def _choose_end(feature: Feature) -> End | None:
    """The end that positive strengths steer towards, chosen by the user where there are two; None for a feature with no ends."""
    if len(feature.ends) < 2:
        return feature.ends[0] if feature.ends else None
    ends = {end.name: end for end in feature.ends}
    chosen = state.url_choice("end", feature.ends[0].name, list(ends))
    st.segmented_control(
        "Towards its end", list(ends), format_func=str.capitalize, required=True, **state.bound("end", chosen)
    )
    return ends[chosen]


def check_request(feature: Feature, request: dict[str, Any]) -> None:
    """Validate the request on the server, whatever the widgets allowed. Raises `ValueError` naming the value and the fix."""
    if not request["prompt"].strip():
        raise ValueError("The prompt is empty: write a few words for the model to continue.")
    if len(request["prompt"]) > MAX_PROMPT:
        raise ValueError(f"The prompt has {len(request['prompt']):,} characters; shorten it to at most {MAX_PROMPT:,}.")
    if not 1 <= request["max_new_tokens"] <= MAX_TOKENS:
        raise ValueError(f"max_new_tokens={request['max_new_tokens']} must be between 1 and {MAX_TOKENS}.")
    if not math.isfinite(request["strength"]) or abs(request["strength"]) > MAX_STRENGTH:
        raise ValueError(f"strength={request['strength']} must be a number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}.")
    if not math.isfinite(request["temperature"]) or request["temperature"] < 0:
        raise ValueError(f"temperature={request['temperature']} must be 0 or more.")
    if feature.store.signed is None:
        raise ValueError(f"Feature {feature.feature}: {SIGNS_MIXED}")
    if feature.p99 is None:
        raise ValueError(
            f"Feature {feature.feature} never fired, so it has no p99 to measure strength in: choose another."
        )


def _generate(store: FeatureStore, feature: Feature, request: dict[str, Any]) -> dict[str, Any]:
    check_request(feature, request)
    steered_end = next((end for end in feature.ends if end.name == request.get("end")), feature)
    options = {key: request[key] for key in ("max_new_tokens", "temperature", "seed")}
    total = request["max_new_tokens"]
    bar = st.progress(0.0, "Waiting for the model")
    with state.MODEL_LOCK:
        bar.progress(0.0, "Loading the model")
        lm = state.load_model(store.manifest["model"]["name"])
        # Streamlit may stop this run at each update of the bar: pressing the button again restarts the page.
        default = lm.generate(request["prompt"], **options, on_token=lambda n: bar.progress(n / total / 2, "Default"))
        with lm.steer(steered_end * request["strength"]):
            steered = lm.generate(
                request["prompt"], **options, on_token=lambda n: bar.progress(0.5 + n / total / 2, "Steered")
            )
    bar.empty()
    other = (
        None
        if lm.hash == store.manifest["model"]["hash"]
        else "The loaded model's weights differ from those the features were collected with."
    )
    shown = f"{feature.feature} ({request['end']} end)" if len(feature.ends) > 1 else str(feature.feature)
    return request | {"feature": shown, "default": default, "steered": steered, "warning": other}


def _result() -> None:
    result = st.session_state.get("steered")
    if result is None:
        st.info("Choose a feature and a strength, write a prompt, and press **Generate**.", icon=":material/tune:")
        return
    if result["warning"]:
        st.warning(result["warning"])
    names = ("Default", f"Feature {result['feature']} at {result['strength']:g} \u00d7 p99")
    for column, name, text in zip(st.columns(2), names, (result["default"], result["steered"]), strict=True):
        column.markdown(f"**{name}**")
        column.html(_output(text, result["prompt"]))
    st.caption(
        f"Both with seed {result['seed']}, temperature {result['temperature']:g} "
        f"and {result['max_new_tokens']} new tokens."
    )


def _output(text: str, prompt: str) -> str:
    """Generated text as HTML, escaped line by line because it is untrusted; the prompt is dimmed."""
    head, tail = (prompt, text[len(prompt) :]) if text.startswith(prompt) else ("", text)
    shown = [("<br>").join(escape(line) for line in part.split("\n")) for part in (head, tail)]
    return f'<div class="sa-out"><bdi><span class="sa-prompt">{shown[0]}</span>{shown[1]}</bdi></div>'
