"""Steer page: change features while the model writes, and compare unsteered and steered texts from the same seeds.

Every setting is in the address. Enter in a box applies it, as everywhere in the dashboard; only the button generates.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import streamlit as st

from saelab.app import as_python, markdown, state, steer_edits, steer_plan, steered_text, url
from saelab.app.steer_edits import KINDS, MAX_STRENGTH, PageEdit
from saelab.app.steered_text import MAX_PROMPT, MAX_SEEDS, MAX_STRENGTHS, MAX_TOKENS, signed
from saelab.features import End, Feature, FeatureStore
from saelab.features.render import feature_examples_html, model_label

MAX_TEMPERATURE, MAX_SEED, MAX_PROMPT_IN_URL = 5.0, 2**31 - 1, 500
_PROMPT = "The weather today"
_ON = {"both": "Prompt and new text", "prompt": "Prompt", "generated": "New text"}
_SWITCH = ("False", "True")


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
        request |= _more(store, request)
    state.page_title(f"Steer with feature {feature.feature}")
    as_python.offer(*steered_text.as_python(request), store=store, models=[store.manifest["model"]["name"]])
    with right:
        _texts(store, request, pressed)
        st.subheader(f"Feature {feature.feature} fires on")
        st.html(feature_examples_html(feature, 3))
        if len(feature.ends) > 1:
            st.subheader(f"and at its {feature.ends[1].name} end on")
            st.html(feature_examples_html(feature, 3, "bottom"))


def _texts(store: FeatureStore, request: dict[str, Any], pressed: bool) -> None:
    """Generate if asked to, and show the last texts."""
    box = st.empty()
    if pressed:
        for name in ("steered", "steer_stopped"):  # after an error, nothing old stands beside the message
            st.session_state.pop(name, None)
        with box.container(), state.friendly_errors():
            st.session_state["steered"] = steered_text.generate(store, request)
    if result := st.session_state.get("steered"):
        with box.container():
            steered_text.show_result(result, request, store)
            if result["request"]["chat"]:
                _offer_branches(result)
    elif "steer_stopped" in st.session_state:
        with box.container():
            steered_text.show_stopped()


def _controls(store: FeatureStore) -> tuple[Feature, dict[str, Any]]:
    """The chosen feature, and what to generate with it."""
    index = url.integer("feature", state.default_feature(store), 0, store.d_sae - 1)
    st.session_state["feature"] = index
    feature, strength = store.feature(index), url.real("strength", 2.0, -MAX_STRENGTH, MAX_STRENGTH)
    kind = url.choice("do", "add", list(KINDS))
    tokens, seed = url.integer("tokens", 40, 1, MAX_TOKENS), url.integer("seed", 0, 0, MAX_SEED)
    temperature, prompt = url.real("temperature", 0.0, 0.0, MAX_TEMPERATURE), _prompt()
    end = None
    if not steer_plan.chosen(store):
        with st.container(horizontal=True):
            st.number_input("Feature", 0, store.d_sae - 1, step=1, width=150, **url.bound("feature", index))
            st.number_input(
                "Strength (\u00d7 p99)" if KINDS[kind].in_p99 else "Strength", -MAX_STRENGTH, MAX_STRENGTH, step=0.5,
                format="%g", width=150, disabled=not steer_edits.takes_strength(kind), **url.bound("strength", strength),
            )  # fmt: skip
        end = _choose_end(feature)
        if end is not None and KINDS[kind].in_p99:
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
    ends = len(feature.ends) > 1
    edit = PageEdit(index, kind, strength, end.name if end and ends else "")
    request = {"edits": (edit,), "prompt": prompt, "max_new_tokens": tokens}
    return feature, request | {"temperature": temperature, "seed": seed}


def _more(store: FeatureStore, request: dict[str, Any]) -> dict[str, Any]:
    """What one feature at one strength can do without: more features, other edits, strengths and seeds in a row, chat."""
    kind, on = request["edits"][0].kind, url.choice("on", "both", list(_ON))
    strengths = url.parsed("strengths", (), _strengths, f"up to {MAX_STRENGTHS} numbers such as 0.5,1,2")
    n_seeds = url.integer("seeds", 1, 1, MAX_SEEDS)
    control, chat = (url.choice(name, "False", _SWITCH) == "True" for name in ("control", "chat"))
    plan = steer_plan.chosen(store)
    used = plan or kind != "add" or on != "both" or strengths or n_seeds > 1 or control or chat
    with st.expander("More features and options", expanded=bool(used or "edits" in st.query_params)):
        if plan:
            steer_plan.show_chosen(store)
        edits = request["edits"] if plan else _edits(store, request["edits"], on)
        with st.container(horizontal=True):
            st.text_input(
                "Strengths in a row", placeholder="0.5, 1, 2", width=180,
                help="A text for each: the strengths above times these numbers.",
                **url.bound("strengths", ",".join(f"{one:g}" for one in strengths)),
            )  # fmt: skip
            st.number_input("Number of seeds", 1, MAX_SEEDS, step=1, width=140, **url.bound("seeds", n_seeds))
        st.checkbox(
            "Also with a random direction of the same norm", help="The control: what as hard a push does that means nothing.",
            **url.bound("control", control),
        )  # fmt: skip
        st.checkbox("Chat: with the template of the model", **url.bound("chat", chat))
        more = {"edits": edits, "plan": plan, "on": on, "strengths": strengths, "n_seeds": n_seeds, "control": control}
        more |= {"chat": chat, "turns": _turns() if chat else ()}
        steer_plan.show(store, partial(steered_text.plan_of, store, request | more))
    return more


def _edits(store: FeatureStore, edits: tuple[PageEdit, ...], on: str) -> tuple[PageEdit, ...]:
    """What is done with the chosen feature, further features, and the tokens that are steered."""
    st.selectbox(
        "What is done with the feature", list(KINDS), format_func=lambda name: KINDS[name].label,
        **url.bound("do", edits[0].kind),
    )  # fmt: skip
    edits = (*edits, *steer_edits.show_rows(store))
    st.segmented_control(
        "Steered tokens", list(_ON), format_func=_ON.__getitem__, required=True, wrap=True, **url.bound("on", on)
    )
    return edits


def _strengths(text: str) -> tuple[float, ...]:
    """The strengths of an address. Raises `ValueError` for anything else."""
    found = tuple(float(one) for one in re.split(r"\s*,\s*|\s+", text.strip())) if text.strip() else ()
    wrong = any(not math.isfinite(one) or abs(one) > MAX_STRENGTH for one in found)
    if wrong or len(found) > MAX_STRENGTHS or len(set(found)) < len(found):
        raise ValueError(text)
    return found


def _turns() -> tuple[dict[str, str], ...]:
    """What was said before in the chat, shown with a way to start again."""
    turns = tuple(st.session_state.get("steer_turns", ()))
    if turns:
        for turn in turns:
            st.caption(f"**{turn['role']}**: {markdown.plain(turn['content'])}")
        st.button("Start the chat again", on_click=lambda: st.session_state.pop("steer_turns", None))
    return turns


def _offer_branches(result: dict[str, Any]) -> None:
    """Go on with the chat from any of the answers: the others are branches not taken."""
    rows = result["rows"]
    choice = st.selectbox("Go on from the answer", range(len(rows)), format_func=lambda i: _branch_name(rows[i]))
    st.button("Go on", icon=":material/subdirectory_arrow_right:", on_click=_go_on, args=(result, choice))


def _branch_name(row: dict[str, Any]) -> str:
    strength = "unsteered" if row["strength"] is None else f"\u00d7 {row['strength']:g}"
    return f"{strength}{', random' if row['control'] else ''}, seed {row['seed']}: {row['text'][:60]}"


def _go_on(result: dict[str, Any], choice: int) -> None:
    made = result["request"]
    said = [("user", made["prompt"]), ("assistant", result["rows"][choice]["text"])]
    st.session_state["steer_turns"] = [*made["turns"], *({"role": role, "content": text} for role, text in said)]
    st.session_state.pop("steered", None)


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
