"""The forms of the Jobs page: the arguments of each kind of job, the same as a command and in Python, and the button that starts
it."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

import streamlit as st

from saelab.app import markdown, state, url
from saelab.errors import SaelabError
from saelab.features.schema import MANIFEST
from saelab.features.visible import escape
from saelab.jobs import Collect, Kind, Label, Verify, start
from saelab.jobs.kinds import MAX_TEXT, check_address, command
from saelab.run_folder import summary
from saelab.runs import SaeRun

_MEANINGS = {
    "verify": "Checks every byte of the feature store by its hash, the numbers of all features against each other, and "
    "examples against what model and SAE compute.",
    "features": "Collects statistics and examples of every feature on the SAE's held-out texts. An interrupted pass goes on, "
    "and more tokens extend a finished store.",
    "label": "Asks a language model for a label of each feature, and scores how far it holds. Labels written by hand outrank "
    "these.",
}
_NEAR = ("127.0.0.1", "localhost", "::1")
REFUSED = "job_refused"
_SHARPEST = "the sharpest"


def show(sae: SaeRun, name: str) -> None:
    """The form of one kind."""
    with st.container(border=True), state.friendly_errors():
        st.markdown(_MEANINGS[name])
        if name != "features" and not (sae.features_dir / MANIFEST).exists():
            st.info(f"No features have been collected for {markdown.plain(sae.name)} yet.", icon=":material/info:")
            url.go_button("Collect them", ":material/arrow_forward:", kind="features")
            return
        kind = _FORMS[name](sae)
        if kind is None:
            return
        kind.check(sae)
        allowed = _says_where_it_sends(kind)
        st.button(
            f"Start: {kind.title.lower()}", type="primary", icon=":material/play_arrow:", key="start_job", disabled=not allowed,
            on_click=_start, args=(sae.name, kind),
        )  # fmt: skip
        with st.expander("Copy as command or Python", icon=":material/content_copy:"):
            st.code(command(kind, sae), language=None, wrap_lines=True)
            st.code(kind.python(sae), language=None, wrap_lines=True)
    show_refusal()


def show_refusal() -> None:
    """Why what was asked last did not happen, once."""
    if refused := st.session_state.pop(REFUSED, None):
        st.error(markdown.plain(refused), icon=":material/error:")


def _start(sae: str, kind: Kind) -> None:
    try:
        st.query_params["job"] = start(state.run_folder(), sae, kind).id
    except (SaelabError, ValueError) as error:
        st.session_state[REFUSED] = str(error)


def _verify(sae: SaeRun) -> Kind:
    n = st.number_input("Examples to compute again", 1, 100_000, 100, key="verify_examples")
    return Verify(n_examples=int(n))


def _collect(sae: SaeRun) -> Kind:
    everything = st.toggle("All held-out tokens", True, key="collect_all")
    n_tokens = None
    if not everything:
        n_tokens = int(st.number_input("Tokens", 1, 10**12, 100_000, step=100_000, key="collect_tokens"))
    renew = st.toggle("Collect again what is there", key="collect_renew", help="Replaces the store; annotations stay.")
    with_model = summary(sae).model
    st.caption(f"Runs the model {markdown.plain(with_model or 'that the SAE records')} on this machine.")
    return Collect(n_tokens=n_tokens, renew=renew)


def _label(sae: SaeRun) -> Kind | None:
    store = state.store()
    where = st.segmented_control(
        "Asked", ["address", "local"], required=True, wrap=True, default="address", key="label_where",
        format_func={"address": "A server at an address", "local": "A model loaded here"}.__getitem__,
    )  # fmt: skip
    address = ""
    if where == "address":
        address = st.text_input(
            "Address", max_chars=MAX_TEXT, key="label_address", placeholder="http://127.0.0.1:8000/v1",
            help="Of a server of OpenAI's protocol: vLLM, llama.cpp, Ollama or a hosted one. Its key is read from the "
            "environment variable OPENAI_API_KEY of the dashboard.",
        ).strip()  # fmt: skip
    model = st.text_input(
        "Model", max_chars=MAX_TEXT, key=f"label_model_{where}", placeholder="smollm2" if where == "local" else "its name there",
        help="A Hugging Face id is fetched if it is not on this machine yet." if where == "local" else None,
    ).strip()  # fmt: skip
    lists = store.lists
    among = st.selectbox("Features", [_SHARPEST, *sorted(lists)], key="label_list", help="Or those of a list.")
    most = min(store.d_sae, len(lists.get(among, [])) or store.d_sae)
    n = int(st.number_input("How many at most", 1, most, min(100, most), key=f"label_n_{most}"))
    if not model or (where == "address" and not address):
        st.caption("Fill in address and model." if where == "address" else "Fill in the model.")
        return None
    return Label(address=address, model=model, n_features=n, feature=tuple(lists.get(among, [])[:1000]))


def _says_where_it_sends(kind: Kind) -> bool:
    """Say what leaves this machine; returns whether that is allowed: anything but this machine has to be confirmed."""
    if not isinstance(kind, Label):
        return True
    if not kind.address:
        st.caption("The model runs on this machine; nothing is sent.")
        return True
    check_address(kind.address)
    st.html(
        f'<p class="sa-sends">Texts around examples of up to {kind.n_features:,} features are sent to '
        f"<b>{escape(kind.address)}</b> (model {escape(kind.model)}), and nowhere else.</p>"
    )
    host = urlsplit(kind.address).hostname or ""
    return host in _NEAR or st.checkbox(f"Send them to {markdown.plain(host)}", key=f"label_sends_{host}")


_FORMS: dict[str, Callable[[SaeRun], Kind | None]] = {"verify": _verify, "features": _collect, "label": _label}
