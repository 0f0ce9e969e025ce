"""Plan files on the Steer page: the edits of the page as a file, and a file of edits instead of them."""

from __future__ import annotations

from typing import Any

import streamlit as st

from saelab.app import markdown
from saelab.app.steer_edits import MAX_EDITS
from saelab.errors import SaelabError
from saelab.features import FeatureStore

MAX_BYTES = 1_000_000
_KEY = "steer_plan"


def chosen(store: FeatureStore) -> str:
    """The text of the plan file that this session steers with; "" for the edits of the page."""
    folder, text = st.session_state.get(_KEY, (None, ""))
    return text if folder == store.folder else ""


def build(store: FeatureStore, text: str) -> Any:
    """The plan in a file. Raises `ValueError` for one that is too large, is no plan, has too many edits, or is of another SAE."""
    from saelab.steering import Plan

    if len(text.encode()) > MAX_BYTES:
        raise ValueError(f"The plan has {len(text.encode()):,} bytes; at most {MAX_BYTES:,} are read.")
    plan = Plan.from_json(text, store)
    if len(plan.edits) > MAX_EDITS:
        raise ValueError(f"The plan has {len(plan.edits)} edits; the page takes at most {MAX_EDITS}.")
    return plan


def show(store: FeatureStore, make: Any) -> None:
    """Buttons for the plan file; `make()` builds the plan that the page shows."""
    st.download_button(
        "Download plan", lambda: make().to_json() + "\n", "plan.json", "application/json", icon=":material/download:",
        type="tertiary", on_click="ignore",
    )  # fmt: skip
    st.file_uploader("Steer with a plan file", "json", key="plan_upload", on_change=_read, args=(store,))
    if message := st.session_state.pop("steer_plan_error", None):
        st.error(markdown.with_commands(message), icon=":material/error:")


def show_chosen(store: FeatureStore) -> None:
    """Name the edits of the plan file that takes the place of the page's, and the way back."""
    plan = build(store, chosen(store))
    edits = ", ".join(markdown.plain(repr(edit).strip("<>")[:120]) for edit in plan.edits)
    st.info(f"Steering with a plan file: {edits}; {markdown.plain(plan.describe())}.", icon=":material/description:")
    st.caption("A plan file is not kept in the address.")
    st.button("Remove the plan", icon=":material/close:", on_click=lambda: st.session_state.pop(_KEY, None))


def _read(store: FeatureStore) -> None:
    """Take the uploaded file as the plan, or keep why it is none."""
    file = st.session_state.get("plan_upload")
    if file is None:
        return
    try:
        text = file.getvalue()[: MAX_BYTES + 1].decode("utf-8")
        build(store, text)
    except UnicodeDecodeError:
        st.session_state["steer_plan_error"] = "The file is no text in UTF-8, so it is no plan."
    except (SaelabError, ValueError) as error:
        st.session_state["steer_plan_error"] = str(error)
    else:
        st.session_state[_KEY] = store.folder, text
