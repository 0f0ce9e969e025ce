"""Unsteered and steered texts on the Steer page: checked, generated under the eyes of the user, and shown with their numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import streamlit as st

from saelab.app import effect_chart, markdown, state, steer_edits, steer_plan
from saelab.app.steer_edits import KINDS
from saelab.features import FeatureStore
from saelab.features.render import model_label
from saelab.features.visible import escape

MAX_PROMPT, MAX_TOKENS, MAX_SEEDS, MAX_STRENGTHS = 8000, 512, 8, 8
MAX_NEW_TOKENS_IN_ALL = 16_384
"""New tokens of all texts together: they are written in one batch, which has to fit in memory."""
_REDRAWN, _READ_AGAIN = 0.15, 1.5
"""Seconds between two looks at the texts, and between two readings, which cost a forward pass."""


def n_texts(request: dict[str, Any]) -> int:
    """Texts of a request, the unsteered ones included."""
    return request["n_seeds"] * (1 + len(request["strengths"] or (1,)) * (2 if request["control"] else 1))


def check_request(store: FeatureStore, request: dict[str, Any]) -> None:
    """Validate the request on the server, whatever the widgets allowed. Raises `ValueError` naming the value and the fix."""
    if not request["prompt"].strip():
        raise ValueError("The prompt is empty: write a few words for the model to continue.")
    if len(request["prompt"]) > MAX_PROMPT:
        raise ValueError(f"The prompt has {len(request['prompt']):,} characters; shorten it to at most {MAX_PROMPT:,}.")
    if not 1 <= request["max_new_tokens"] <= MAX_TOKENS:
        raise ValueError(f"max_new_tokens={request['max_new_tokens']} must be between 1 and {MAX_TOKENS}.")
    if not math.isfinite(request["temperature"]) or request["temperature"] < 0:
        raise ValueError(f"temperature={request['temperature']} must be 0 or more.")
    if not 1 <= request["n_seeds"] <= MAX_SEEDS or len(request["strengths"]) > MAX_STRENGTHS:
        raise ValueError(f"At most {MAX_SEEDS} seeds and {MAX_STRENGTHS} strengths are written at once.")
    if (tokens := n_texts(request) * request["max_new_tokens"]) > MAX_NEW_TOKENS_IN_ALL:
        raise ValueError(
            f"{tokens:,} new tokens in all; ask for fewer tokens, seeds or strengths: {MAX_NEW_TOKENS_IN_ALL:,} at most."
        )
    if not request["plan"]:
        steer_edits.check(store, request["edits"])


def plan_of(store: FeatureStore, request: dict[str, Any]) -> Any:
    """The edits of the page, or the plan file. Raises `ValueError` and `SaelabError` for what cannot be steered."""
    from saelab.steering import Plan

    if request["plan"]:
        return steer_plan.build(store, request["plan"])
    return Plan([edit.build(store) for edit in request["edits"]], on=request["on"])


def generate(store: FeatureStore, request: dict[str, Any]) -> dict[str, Any]:
    """The texts, drawn into the page as they grow. Streamlit may end the run at any new token: whatever is changed on the page
    restarts it; then the texts so far stay in `steer_stopped`."""
    from saelab.steering.compare_html import comparison_html, effect_against_cost, tokens_html

    check_request(store, request)
    found, same_model = _compared(store, request)
    st.session_state.pop("steer_stopped", None)
    steered = next(one for one in found.texts if one.strength is not None)
    before, simple = "" if request["chat"] else request["prompt"], len(found.texts) == 2
    warning = "" if same_model else "The loaded model's weights differ from those the features were collected with."
    return {
        "request": request, "folder": store.folder, "rows": found.rows, "warning": warning,
        "unsteered": before + found.texts[0].text, "steered": before + steered.text,
        "html": [tokens_html(found, one) for one in found.texts] if simple else [comparison_html(found, with_plot=False)],
        "effect": effect_against_cost(found),
    }  # fmt: skip


def _compared(store: FeatureStore, request: dict[str, Any]) -> tuple[Any, bool]:
    """The comparison, and whether the model is the one that the features were collected with."""
    from saelab.steering import compare

    with _told() as (status, drafts), state.MODEL_LOCK:
        status.caption(f"Loading {markdown.plain(model_label(store.manifest['model']['name']))}.")
        lm = state.load_model(store.manifest["model"]["name"])
        status.caption("Writing.")
        turns = [*request["turns"], {"role": "user", "content": request["prompt"]}]
        read = [] if request["plan"] else [store.feature(index) for index in {one.feature for one in request["edits"]}]
        found = compare(
            lm, lm.chat(turns) if request["chat"] else request["prompt"], plan_of(store, request),
            strengths=request["strengths"] or 1.0, seeds=range(request["seed"], request["seed"] + request["n_seeds"]),
            max_new_tokens=request["max_new_tokens"], temperature=request["temperature"], control=request["control"],
            read=read, on_step=_drawing(request, status, drafts), progress=False,
        )  # fmt: skip
    return found, lm.hash == store.manifest["model"]["hash"]


@contextmanager
def _told() -> Iterator[tuple[Any, Any]]:
    """Places for the progress and for the texts so far, above a button that ends it: any button makes Streamlit end the run,
    by an exception that is no `Exception`. They are emptied once the texts are there, and after an error."""
    status, drafts, stop = st.empty(), st.empty(), st.empty()
    status.caption("Waiting for the model.")
    stop.button("Stop", icon=":material/stop:", key="steer_stop")
    try:
        yield status, drafts
    except Exception:
        st.session_state.pop("steer_stopped", None)
        _emptied(status, drafts, stop)
        raise
    _emptied(status, drafts, stop)


def _emptied(*containers: Any) -> None:
    for container in containers:
        container.empty()


def _drawing(request: dict[str, Any], status: Any, drafts: Any) -> Callable[[int, Callable[[], list[Any]]], None]:
    """What draws the texts so far, and notices that the run was ended."""
    from saelab.steering.compare_html import STYLE, drafts_html

    drawn, was_read, n_tokens = 0.0, time.monotonic(), request["max_new_tokens"]
    read: list[Any] = []

    def draw(n: int, texts: Callable[..., list[Any]]) -> None:
        nonlocal drawn, was_read, read
        status.caption(f"Writing: {n} of {n_tokens} tokens.")
        if time.monotonic() - drawn > _REDRAWN:
            if time.monotonic() - was_read > _READ_AGAIN:
                read, was_read = texts(read=True), time.monotonic()
            html = f"<style>{STYLE}</style>{drafts_html(texts(), request['prompt'], read)}"
            st.session_state["steer_stopped"] = (n, n_tokens, html)
            drafts.html(html)
            drawn = time.monotonic()

    return draw


def as_python(request: dict[str, Any]) -> list[str]:
    """The lines that generate the texts."""
    sampling = {name: request[name] for name in ("max_new_tokens", "temperature")}
    shown = f"[*{request['turns']!r}, {{'role': 'user', 'content': {request['prompt']!r}}}]"
    lines = [f"prompt = lm.chat({shown})" if request["chat"] else f"prompt = {request['prompt']!r}"]
    options = ", ".join(f"{name}={value!r}" for name, value in sampling.items())
    edits = request["edits"]
    if not request["plan"] and n_texts(request) == 2 and len(edits) == 1 and request["on"] == "both":
        options += f", seed={request['seed']!r}"
        return [
            *lines,
            f"print(lm.generate(prompt, {options}))",
            f"with lm.steer({edits[0].code}):",
            f"    print(lm.generate(prompt, {options}))",
        ]
    made = f"Plan([{', '.join(edit.code for edit in edits)}], on={request['on']!r})"
    made = f"Plan.from_json({request['plan']!r}, store)" if request["plan"] else made
    seeds = f"range({request['seed']}, {request['seed'] + request['n_seeds']})"
    return [
        "from saelab.steering import Plan, compare",
        *lines,
        f"plan = {made}",
        f"print(compare(lm, prompt, plan, strengths={list(request['strengths'] or (1.0,))}, seeds={seeds}, {options}, "
        f"control={request['control']}))",
    ]


def show_stopped() -> None:
    """The texts of a generation that was ended before its time."""
    n, n_tokens, html = st.session_state["steer_stopped"]
    st.caption(f"Stopped after {n} of {n_tokens} new tokens.")
    st.html(html)


def show_result(result: dict[str, Any], request: dict[str, Any], store: FeatureStore) -> None:
    """The texts; marked where they were made with other settings than those that the page shows now."""
    from saelab.steering.compare_html import STYLE

    made = result["request"]
    other = [key for key, value in request.items() if made[key] != value and key != "turns"]
    if other or result["folder"] != store.folder:
        st.warning(
            f"These texts were made with other settings ({_said(made, request, other)}). Press **Generate** for new ones.",
            icon=":material/history:",
        )
    if result["warning"]:
        st.warning(result["warning"])
    if result["effect"]:
        effect_chart.show(result["effect"])
    st.html(f"<style>{STYLE}</style>")
    if len(result["html"]) == 1:
        st.html(result["html"][0])
    else:
        _show_two(result)
    st.caption(
        f"Both with seed {made['seed']}, temperature {made['temperature']:g} and {made['max_new_tokens']} new tokens."
        if len(result["html"]) == 2
        else f"Seeds {made['seed']} to {made['seed'] + made['n_seeds'] - 1}, {made['max_new_tokens']} new tokens."
    )


def _show_two(result: dict[str, Any]) -> None:
    """The unsteered and the steered text beside each other, with what the steered one shows and costs."""
    made, (base, steered) = result["request"], result["rows"]
    names = "Unsteered", plan_name(made)
    for column, name, html, row in zip(st.columns(2), names, result["html"], (base, steered), strict=True):
        column.markdown(f"**{name}**")
        prompt = "<br>".join(escape(line) for line in made["prompt"].split("\n")) + ("<br>" if made["chat"] else "")
        column.html(
            f'<div class="sa-out sc"><bdi><span class="sa-prompt">{prompt}</span><span class="sc-text">{html}</span></bdi></div>'
        )
        read = "" if row["read_back"] is None else f"Read back on {row['read_back']:.0%} of the tokens. "
        cost = f"Cost {signed(row['nll_cost'])} nats per token." if row is steered else ""
        column.caption(f"{read}{cost}".strip(), help=_HELP)


_HELP = (
    "Marked are the tokens on which the unsteered model and SAE, reading the text, find the feature above a quarter of its p99. "
    "The cost is how much less likely the text is under the unsteered model than its own. Dimmed: tokens that both texts have."
)


def plan_name(request: dict[str, Any]) -> str:
    """What steers, in a few words."""
    if request["plan"]:
        return "Steered by the plan file"
    edits: Sequence[Any] = request["edits"]
    first, kind = edits[0], KINDS[edits[0].kind]
    end = " (negative end)" if first.end == "negative" else ""
    if len(edits) > 1:
        return f"Features {', '.join(str(one.feature) for one in edits)}"
    if first.kind == "add":
        return f"Feature {first.feature}{end} at {signed(first.strength)} \u00d7 p99"
    unit = " \u00d7 p99" if kind.in_p99 else ""
    strength = f" {signed(first.strength)}{unit}" if steer_edits.takes_strength(first.kind) else ""
    return f"Feature {first.feature}{end}: {kind.label.lower()}{strength}"


def signed(value: float | int) -> str:
    """A number to three digits, with a proper minus sign."""
    return (str(value) if isinstance(value, int) else f"{value:.3g}").replace("-", "\u2212")


_NAMES = {"max_new_tokens": "new tokens", "n_seeds": "seeds", "on": "steered tokens"}


def _said(made: dict[str, Any], request: dict[str, Any], other: list[str]) -> str:
    named = []
    for key in other:
        if key == "edits":
            named += _edits_said(made[key], request[key])
        elif key in ("prompt", "plan"):
            named.append(f"another {key}")
        else:
            named.append(f"{_NAMES.get(key, key)} {_value_said(made[key])}")
    return markdown.plain(", ".join(named) or "another SAE")


def _value_said(value: Any) -> str:
    return signed(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _edits_said(made: Sequence[Any], shown: Sequence[Any]) -> list[str]:
    """How one edit differed; several are counted."""
    if len(made) != 1 or len(shown) != 1:
        return [f"{len(made)} edits" if len(made) > 1 else "one edit"]
    (before,), (now,) = made, shown
    said = {
        "feature": f"feature {before.feature}", "kind": KINDS[before.kind].label.lower(),
        "strength": f"strength {signed(before.strength)}", "end": f"its {before.end} end",
    }  # fmt: skip
    return [text for name, text in said.items() if getattr(before, name) != getattr(now, name)]
