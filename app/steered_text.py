"""Unsteered and steered text on the Steer page: checked, generated under the eyes of the user, and shown."""

from __future__ import annotations

import math
from typing import Any

import streamlit as st

from saelab.app import markdown, state
from saelab.features import Feature, FeatureStore
from saelab.features.manifest import SIGNS_MIXED
from saelab.features.render import model_label
from saelab.features.visible import escape

MAX_PROMPT, MAX_TOKENS, MAX_STRENGTH = 8000, 512, 100.0
_SAMPLING = ("max_new_tokens", "temperature", "seed")


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


def signed(value: float | int) -> str:
    """A number to three digits, with a proper minus sign."""
    return (str(value) if isinstance(value, int) else f"{value:.3g}").replace("-", "\u2212")


def generate(store: FeatureStore, feature: Feature, request: dict[str, Any]) -> dict[str, Any]:
    """Both texts, written into the page as they grow. Streamlit may end the run at any new token: whatever is changed on the
    page restarts it, and nothing is kept."""
    check_request(feature, request)
    end = next((end for end in feature.ends if end.name == request["end"]), feature)
    status = st.empty()
    unsteered_box, steered_box = _boxes(request)
    prompt, options = request["prompt"], {key: request[key] for key in _SAMPLING}
    status.caption("Waiting for the model.")
    with state.MODEL_LOCK:
        status.caption(f"Loading {markdown.plain(model_label(store.manifest['model']['name']))}.")
        lm = state.load_model(store.manifest["model"]["name"])
        status.caption("Writing.")
        key = (lm.hash, prompt, *options.values())
        kept, unsteered = st.session_state.get("unsteered", (None, ""))
        if kept != key:
            unsteered = lm.generate(prompt, **options, on_text=lambda text: unsteered_box.html(_output(text, prompt)))
            st.session_state["unsteered"] = (key, unsteered)
        unsteered_box.html(_output(unsteered, prompt))
        with lm.steer(end * request["strength"]):
            steered = lm.generate(prompt, **options, on_text=lambda text: steered_box.html(_output(text, prompt)))
    same_model = lm.hash == store.manifest["model"]["hash"]
    return {
        "request": request,
        "folder": store.folder,
        "unsteered": unsteered,
        "steered": steered,
        "warning": ""
        if same_model
        else "The loaded model's weights differ from those the features were collected with.",
    }


def as_python(request: dict[str, Any]) -> list[str]:
    """The lines that generate both texts."""
    options = ", ".join(f"{key}={request[key]!r}" for key in _SAMPLING)
    end = f".{request['end']}" if request["end"] else ""
    return [
        f"prompt = {request['prompt']!r}",
        f"print(lm.generate(prompt, {options}))",
        f"with lm.steer(store.feature({request['feature']}){end} * {request['strength']!r}):",
        f"    print(lm.generate(prompt, {options}))",
    ]


def _names(request: dict[str, Any]) -> tuple[str, str]:
    end = f" ({request['end']} end)" if request["end"] == "negative" else ""
    return "Unsteered", f"Feature {request['feature']}{end} at {signed(request['strength'])} \u00d7 p99"


def _boxes(request: dict[str, Any]) -> list[Any]:
    """A named place for each text."""
    boxes = []
    for column, name in zip(st.columns(2), _names(request), strict=True):
        column.markdown(f"**{name}**")
        boxes.append(column.empty())
    return boxes


def show_result(result: dict[str, Any], request: dict[str, Any], store: FeatureStore) -> None:
    """Both texts; marked where they were made with other settings than those that the page shows now."""
    made = result["request"]
    other = [key for key, value in request.items() if made[key] != value]
    if other or result["folder"] != store.folder:
        st.warning(
            f"These texts were made with other settings ({_said(made, other)}). Press **Generate** for new ones.",
            icon=":material/history:",
        )
    if result["warning"]:
        st.warning(result["warning"])
    for box, text in zip(_boxes(made), (result["unsteered"], result["steered"]), strict=True):
        box.html(_output(text, made["prompt"]))
    st.caption(
        f"Both with seed {made['seed']}, temperature {made['temperature']:g} and {made['max_new_tokens']} new tokens."
    )


def _said(made: dict[str, Any], other: list[str]) -> str:
    values = {key: made[key] for key in other if key not in ("prompt", "end")}
    named = [f"{key.replace('max_new_tokens', 'new tokens')} {signed(value)}" for key, value in values.items()]
    named += ["another prompt"] if "prompt" in other else []
    named += [f"its {made['end']} end"] if "end" in other else []
    return markdown.plain(", ".join(named) or "another SAE")


def _output(text: str, prompt: str) -> str:
    """Generated text as HTML, escaped line by line because it is untrusted; the prompt is dimmed."""
    head, tail = (prompt, text[len(prompt) :]) if text.startswith(prompt) else ("", text)
    shown = [("<br>").join(escape(line) for line in part.split("\n")) for part in (head, tail)]
    return f'<div class="sa-out"><bdi><span class="sa-prompt">{shown[0]}</span>{shown[1]}</bdi></div>'
