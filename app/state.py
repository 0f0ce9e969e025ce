"""State shared by the pages: the run fixed at startup, the chosen SAE, its store, the URL, and the one language model.

The URL (`sae`, `feature`, `sort`, `page` ...) is the single source of truth for the view: a widget takes its value from
it and writes it back. Text from the URL is looked up or parsed, never joined to a path.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import streamlit as st

from saelab.app.serve import RUN_VARIABLE
from saelab.errors import SaelabError, StoreError
from saelab.features import FeatureStore
from saelab.features.render import model_label
from saelab.features.schema import MANIFEST
from saelab.runs import SaeRun, find_saes, find_snapshots

PARAMETERS = frozenset({
    "sae", "feature", "q", "sort", "order", "show", "list", "page", "kind", "by", "fired", "text",
    "strength", "end", "prompt", "tokens", "temperature", "seed", "doc", "curve", "curves", "job",
    "colour", "near", "lasso", "view", "with", "same", "left", "right", "side",
})  # fmt: skip
"""Every URL parameter of every page; others get a notice."""
MODEL_LOCK = threading.Lock()  # one session generates at a time: two would compete for the same cores


class NoFeaturesError(StoreError):
    """The chosen SAE has no feature store yet."""

    def __init__(self, sae: SaeRun) -> None:
        super().__init__(f"No features have been collected for {sae.name} yet.")
        self.command = f"saelab features {sae.sae_dir}"


@contextmanager
def friendly_errors(title: str = "") -> Iterator[None]:
    """Show an error's message, which states the fix, instead of a traceback; without a store, the page's title and the command
    that makes one."""
    try:
        yield
    except NoFeaturesError as error:
        st.title(title)
        st.info(f"{plain(str(error))} Run this, then reload the page:", icon=":material/info:")
        st.code(error.command, language=None)
    except (SaelabError, ValueError) as error:
        st.error(_with_commands(str(error)), icon=":material/error:")


def _with_commands(text: str) -> str:
    """`plain(text)`, but what it names as a command in backticks stays one."""
    return re.sub(r"\\`(saelab [^`\n]*?)\\`", lambda found: f"`{_unescaped(found[1])}`", plain(text))


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def plain(text: str) -> str:
    """Text with every Markdown special character escaped."""
    return "".join(f"\\{char}" if char in r"\`*_{}[]()<>#+-.!|$~:" else char for char in text)


def run_folder() -> Path:
    """The run that `saelab dash` was given."""
    run = os.environ.get(RUN_VARIABLE)
    if not run:
        raise SaelabError("The dashboard was started without a run: start it with `saelab dash RUN`.")
    return Path(run)


def saes() -> list[SaeRun]:
    """Every SAE in the run."""
    return find_saes(run_folder())


def with_snapshots() -> list[SaeRun]:
    """Every SAE in the run, each followed by its snapshots."""
    return [one for sae in saes() for one in (sae, *find_snapshots(sae.sae_dir))]


def chosen_sae() -> SaeRun:
    """The SAE (or snapshot) named in the URL, else the one this session chose last, else the first."""
    found = {sae.name: sae for sae in with_snapshots()}
    name = url_choice("sae", st.session_state.get("sae_name", ""), ["", *found])
    sae = found.get(name) or next(iter(found.values()))
    st.session_state["sae_name"] = sae.name
    return sae


def store() -> FeatureStore:
    """The open feature store of the chosen SAE. Raises `StoreError`, which says how to make one, when there is none."""
    return store_of(chosen_sae())


def store_of(sae: SaeRun) -> FeatureStore:
    """The open feature store of an SAE, as `store`."""
    manifest = sae.features_dir / MANIFEST
    if not manifest.exists():
        raise NoFeaturesError(sae)
    return _open_store(str(sae.features_dir), manifest.stat().st_mtime_ns)


@st.cache_resource(max_entries=4, show_spinner=False)
def _open_store(folder: str, version: int) -> FeatureStore:
    return FeatureStore(folder)


@st.cache_resource(max_entries=1, show_spinner=False)
def load_model(name: str) -> Any:
    """The language model, loaded once for all sessions."""
    import saelab

    return saelab.load_model(name)


def show_sidebar() -> None:
    """Show the SAE picker and a summary of the current run, SAE and store."""
    found, sae = saes(), chosen_sae()
    with st.sidebar:
        if sae_parameter():
            st.session_state["sae_box"] = sae.name
            names = list(dict.fromkeys([*(each.name for each in found), sae.name]))
            st.selectbox("SAE", names, key="sae_box", on_change=_choose_sae)
        st.caption(f"Run **{plain(run_folder().name)}**")
        with suppress(StoreError):  # the pages that need the store report the error
            manifest = store().manifest
            st.caption(
                f"{plain(sae.name)} \u00b7 {manifest['sae']['hash'][:10]}  \n{plain(manifest['hook_name'])}  \n"
                f"{plain(model_label(manifest['model']['name']))}  \n"
                f"features counted on {counted(store())}  \n{verified(store())}"
            )


def verified(store: FeatureStore) -> str:
    """When `saelab verify` last found that the store holds, as text."""
    entries = store.annotations.latest("verified")
    return f"verified on {entries[0].time[:10]}" if entries else "not verified yet"


def counted(store: FeatureStore) -> str:
    """Number of counted tokens and the split they come from, as text."""
    kind = {"held_out": "held-out tokens", "train": "training tokens"}.get(store.manifest["split"], "tokens")
    return f"{store.n_tokens:,} {kind}"


def default_feature(store: FeatureStore) -> int:
    """The feature this session viewed last, else the sharpest one at or below 1 %, else 0."""
    last = st.session_state.get("feature", -1)
    if 0 <= last < store.d_sae:
        return last
    sort = "sharpness" if store.manifest["version"] >= 3 else "density"
    rows = store.table(sort, True, {"density": (None, 1e-2), "n_fired": (1, None)}, limit=1)
    return rows[0]["feature"] if rows else 0


def _choose_sae() -> None:
    st.query_params.clear()
    st.session_state["sae_name"] = st.query_params["sae"] = st.session_state["sae_box"]


def url_int(name: str, default: int, low: int, high: int) -> int:
    """An integer from the URL; anything else, or a value outside `low` to `high`, shows a notice and returns `default`."""
    text = st.query_params.get(name)
    if text is None:
        return default
    try:
        value = int(text) if len(text) < 20 else high + 1
    except ValueError:
        value = high + 1
    if low <= value <= high:
        return value
    notice(name, text, f"a number from {low} to {high}", default)
    return default


def url_float(name: str, default: float, low: float, high: float) -> float:
    """As `url_int`, for a float."""
    text = st.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if low <= value <= high:
        return value
    notice(name, text, f"a number from {low:g} to {high:g}", default)
    return default


def url_choice(name: str, default: str, options: Sequence[str]) -> str:
    """One of `options` from the URL, with the same fallback."""
    text = st.query_params.get(name)
    if text is None or text in options:
        return text or default
    notice(name, text, "one of " + ", ".join(option for option in options if option), default)
    return default


def url_refused(name: str, text: str, expected: str, default: Any) -> Any:
    """Say that a URL parameter is not as expected, and remove it; returns `default`."""
    notice(name, text, expected, "")
    return default


def notice(name: str, text: str, expected: str, default: Any) -> None:
    """Say that the URL parameter `name` is not what was expected and what is shown instead, and remove it."""
    instead = f" Showing {plain(str(default))}." if default != "" else ""
    _say(f"The URL has {name} = {plain(repr(text[:40]))}; expected {plain(expected)}.{instead}")
    del st.query_params[name]


def check_parameters() -> None:
    """Say which parameters of the URL no page knows, in one notice, and remove them."""
    if unknown := sorted(set(st.query_params) - PARAMETERS):
        names = ", ".join(repr(name[:40]) for name in unknown[:5])
        _say(f"The URL has parameters that the dashboard does not know: {plain(names)}.")
        for name in unknown:
            del st.query_params[name]


def show_notices() -> None:
    """The place of all notices about the URL: above the page."""
    st.session_state["notices"] = st.container()


def _say(text: str) -> None:
    st.session_state["notices"].warning(text, icon=":material/link_off:")


def bound(name: str, value: Any) -> dict[str, Any]:
    """Arguments that bind a widget to the URL parameter `name`: it shows `value` and writes changes back to the URL."""
    key = f"box_{name}"
    st.session_state[key] = value
    return {"key": key, "on_change": _write_url, "args": (name, key)}


MAX_ADDRESS = 1500
"""Characters of text that an address holds: browsers and proxies cut longer ones."""


def text_box_key(name: str, default: str, most: int) -> str:
    """The key of a text box in a form, whose text is that of the URL parameter `name` whenever that has changed, else what was
    typed last. (A box whose value followed the URL without a key would be another box after each submission, and lose the next
    text.)"""
    key, url, session = f"text_{name}", st.query_params.get(name), st.session_state
    if key not in session or (url is not None and url != session.get(f"seen_{name}")):
        session[key] = (session.get(f"typed_{name}", default) if url is None else url)[:most]
    session[f"seen_{name}"] = url
    return key


def keep_texts(texts: dict[str, str]) -> None:
    """Write submitted texts to the URL, by the names of their parameters, if it holds them (`fits_address`)."""
    fits = fits_address(texts)
    for name, text in texts.items():
        st.session_state[f"typed_{name}"] = text
        st.session_state[f"seen_{name}"] = text if fits else None
        if fits:
            st.query_params[name] = text
        else:
            st.query_params.pop(name, None)


def fits_address(texts: dict[str, str]) -> bool:
    """Whether texts are short enough, together, to be restored from the address."""
    return sum(map(len, texts.values())) <= MAX_ADDRESS


def show_pagination(pages: int, page: int) -> None:
    """Show page numbers bound to the URL; nothing where there is only one page."""
    if pages > 1:
        key = f"box_page_{page}"  # st.pagination takes no value from session state without a warning
        st.pagination(pages, default=page, key=key, on_change=_write_url, args=("page", key))


def go_button(label: str, icon: str, shortcut: str | None = None, *, disabled: bool = False, **query: Any) -> None:
    """Show a button that changes this page's URL parameters. (A link to the page one is on would leave the address as it is.)"""
    st.button(label, key=f"go_{label}", icon=icon, shortcut=shortcut, disabled=disabled, on_click=go, kwargs=query)


def go(**query: Any) -> None:
    """Change this page's URL parameters; for a button's `on_click`."""
    st.query_params.pop("doc", None)  # as in _write_url
    for name, value in query.items():
        st.query_params[name] = str(value)


def download(name: str, features: list[int]) -> None:
    """Show a button that saves features of the store as one HTML file; it is made when the button is pressed."""
    chosen = store()

    def page() -> str:
        from saelab.features.html_file import features_html

        return features_html([chosen.feature(feature) for feature in features], "" if len(features) == 1 else name)

    file = re.sub(r"[^\w-]+", "-", name).strip("-")[:60] or "features"
    st.download_button(
        "Save as HTML",
        page,
        f"{file}.html",
        "text/html",
        icon=":material/download:",
        type="tertiary",
        on_click="ignore",
    )


def page_title(title: str) -> None:
    """Set the browser tab's title, so that tabs and history can be told apart."""
    st.set_page_config(page_title=f"{title} \u00b7 saelab")


_ORDERING = ("q", "list", "sort", "order", "show", "fired", "with", "same", "view", "side", "left", "right", "near")
"""Parameters that change what is on which page of a table."""


def _write_url(name: str, key: str) -> None:
    value = st.session_state[key]
    st.query_params[name] = str(value)
    if name in ("feature", "kind"):
        st.query_params.pop("doc", None)  # the open document is that of an example in the view which is left
    if value in (None, "") and name in ("q", "near"):
        del st.query_params[name]
    if name == "near":  # one choice at a time
        st.query_params.pop("lasso", None)
    if name in _ORDERING:
        st.query_params.pop("page", None)  # page numbers are meaningless in another order


def sae_parameter() -> dict[str, str]:
    """The URL parameter that keeps the chosen SAE; {} where a run has only one."""
    found, chosen = saes(), chosen_sae()
    return {"sae": chosen.name} if len(found) > 1 or chosen.name != found[0].name else {}


def link(page: str, label: str, icon: str | None = None, **query: Any) -> None:
    """Show a link to another page that keeps the chosen SAE."""
    parameters = {name: str(value) for name, value in query.items()} | sae_parameter()
    st.page_link(st.session_state["pages"][page], label=label, icon=icon, query_params=parameters)
