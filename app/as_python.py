"""Copy as Python: the lines that compute in a script or notebook what the page shows. Every page hands over its own."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from saelab.app import state
from saelab.errors import StoreError
from saelab.features import FeatureStore

_KEY = "as_python"


def offer(*lines: str, store: FeatureStore | None = None, models: Sequence[str] = ()) -> None:
    """Hand over a page's lines. With `store` they may use `store`, with the names of `models` also `lm`, that model or the
    list of them. Foreign text belongs in them as `repr(text)`."""
    head = ["import saelab", "", f"store = saelab.load_features({str(store.folder)!r})"] if store else []
    if models:
        calls = [f"saelab.load_model({name!r})" for name in models]
        head.append(f"lm = {calls[0] if len(calls) == 1 else '[' + ', '.join(calls) + ']'}")
    st.session_state[_KEY] = "\n".join([*head, *lines])


def show() -> None:
    """Show the lines of the page in the sidebar; of a page that handed over none, those that open its store."""
    lines = st.session_state.pop(_KEY, None)
    if lines is None:
        try:
            offer(store=state.store())
        except StoreError:
            return
        lines = st.session_state.pop(_KEY)
    with st.sidebar, st.popover("Copy as Python", icon=":material/code:", type="tertiary"):
        st.code(lines, language=None, wrap_lines=True)
