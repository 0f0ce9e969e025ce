"""State shared by the pages: the run fixed at startup, the chosen SAE, its store, and the one language model."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import streamlit as st

from saelab.app import markdown, url
from saelab.app.serve import RUN_VARIABLE
from saelab.errors import SaelabError, StoreError
from saelab.features import FeatureStore
from saelab.features.render import model_label
from saelab.features.schema import MANIFEST
from saelab.features.steer_scores import STEER_SCORE, STEERS
from saelab.features.visible import escape
from saelab.hints.next_commands import command
from saelab.runs import SaeRun, find_saes, find_snapshots

MODEL_LOCK = threading.Lock()  # one session generates at a time: two would compete for the same cores


class NoFeaturesError(StoreError):
    """The chosen SAE has no feature store yet."""

    def __init__(self, sae: SaeRun) -> None:
        super().__init__(f"No features have been collected for {sae.name} yet.")
        self.command = command("features", sae.sae_dir)


@contextmanager
def friendly_errors(title: str = "") -> Iterator[None]:
    """Show an error's message, which states the fix, instead of a traceback; without a store, the page's title and the command
    that makes one."""
    try:
        yield
    except NoFeaturesError as error:
        st.title(title)
        st.info(f"{markdown.plain(str(error))} Run this, then reload the page:", icon=":material/info:")
        st.code(error.command, language=None)
    except (SaelabError, ValueError) as error:
        st.error(markdown.with_commands(str(error)), icon=":material/error:")


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
    name = url.choice("sae", st.session_state.get("sae_name", ""), ["", *found])
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


def load_models(store: FeatureStore) -> Any:
    """The model that reads texts for the store's SAE, or all of them as one."""
    from saelab.features.collected_with import model_names
    from saelab.models.multi_model import together

    return together([load_model(name) for name in model_names(store)])


def show_sidebar() -> None:
    """Show the SAE picker and a summary of the current run, SAE and store."""
    found, sae = saes(), chosen_sae()
    with st.sidebar:
        if sae_parameter():
            st.session_state["sae_box"] = sae.name
            names = list(dict.fromkeys([*(each.name for each in found), sae.name]))
            st.selectbox("SAE", names, key="sae_box", on_change=_choose_sae)
        st.caption(f"Run **{markdown.plain(run_folder().name)}**")
        with suppress(StoreError):  # the pages that need the store report the error
            manifest = store().manifest
            st.caption(
                f"{markdown.plain(sae.name)} \u00b7 {manifest['sae']['hash'][:10]}  \n{markdown.plain(manifest['hook_name'])}  \n"
                f"{markdown.plain(model_label(manifest['model']['name']))}  \n"
                f"features counted on {counted(store())}  \n{verified(store())}",
                help="`saelab verify RUN`, also on the page Jobs, computes stored examples again and compares every file.",
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
    """The feature this session viewed last, else the one that steers best, else the sharpest one at or below 1 %, else 0."""
    last = st.session_state.get("feature", -1)
    if 0 <= last < store.d_sae:
        return last
    if best := store.features(STEER_SCORE, True, {STEER_SCORE: (STEERS, None)})[:1]:
        return best[0]
    sort = "sharpness" if store.manifest["version"] >= 3 else "density"
    rows = store.table(sort, True, {"density": (None, 1e-2), "n_fired": (1, None)}, limit=1)
    return rows[0]["feature"] if rows else 0


def _choose_sae() -> None:
    st.query_params.clear()
    st.session_state["sae_name"] = st.query_params["sae"] = st.session_state["sae_box"]


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


def show_purpose(store: FeatureStore, purpose: str) -> None:
    """Say what a page is for whose button loads the model."""
    model = escape(model_label(store.manifest["model"]["name"]))
    st.html(f'<p class="sa-sub">{purpose} The model {model} is loaded when you press the button.</p>')


def page_title(title: str) -> None:
    """Set the browser tab's title, so that tabs and history can be told apart."""
    st.set_page_config(page_title=f"{title} \u00b7 saelab")


def sae_parameter() -> dict[str, str]:
    """The URL parameter that keeps the chosen SAE; {} where a run has only one."""
    found, chosen = saes(), chosen_sae()
    return {"sae": chosen.name} if len(found) > 1 or chosen.name != found[0].name else {}


def link(page: str, label: str, icon: str | None = None, **query: Any) -> None:
    """Show a link to another page that keeps the chosen SAE."""
    parameters = {name: str(value) for name, value in query.items()} | sae_parameter()
    st.page_link(st.session_state["pages"][page], label=label, icon=icon, query_params=parameters)
