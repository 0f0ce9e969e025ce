"""What people add to a feature: a label, a star, lists, a note. It is written to `annotations.sqlite` in the run at once."""

from __future__ import annotations

import streamlit as st

from saelab.app import markdown, state
from saelab.errors import StoreError
from saelab.features import Feature

_MAX_LABEL, _MAX_NOTE, _MAX_LIST = 200, 4000, 60
STARRED = "starred"


def show(feature: Feature) -> None:
    """Show the form."""
    with st.expander("Label, star, lists and notes", icon=":material/edit:"), state.friendly_errors():
        notes, index = feature.store.annotations, feature.feature
        label = next((one.value for one in notes.latest("label") if one.feature == index), "")
        note = next((one.value for one in notes.latest("note", "") if one.feature == index), "")
        lists = sorted(one.name for one in notes.latest("list") if one.feature == index)
        _field("label", index, label)
        st.text_input(
            "Label", max_chars=_MAX_LABEL, placeholder=feature.row["label"] or "", key=f"label_{index}",
            on_change=_write, args=(feature, "label", "", f"label_{index}"), help="Outranks what saelab finds by itself.",
        )  # fmt: skip
        _field("star", index, STARRED in lists)
        st.toggle("Star", key=f"star_{index}", on_change=_star, args=(feature, f"star_{index}"))
        _field("lists", index, lists)
        st.multiselect(
            "Lists", sorted({*feature.store.lists, *lists}), key=f"lists_{index}", accept_new_options=True,
            on_change=_choose_lists, args=(feature, f"lists_{index}", lists), placeholder="Choose or name a list",
        )  # fmt: skip
        _field("note", index, note)
        st.text_area(
            "Note", max_chars=_MAX_NOTE, key=f"note_{index}", height=90,
            on_change=_write, args=(feature, "note", "", f"note_{index}"),
        )  # fmt: skip


def _field(name: str, index: int, value: object) -> None:
    st.session_state[f"{name}_{index}"] = value


def _write(feature: Feature, kind: str, name: str, key: str) -> None:
    text = str(st.session_state[key] or "").strip()
    _add(feature, kind, text or None, name)


def _star(feature: Feature, key: str) -> None:
    _add(feature, "list", True if st.session_state[key] else None, STARRED)


def _choose_lists(feature: Feature, key: str, before: list[str]) -> None:
    chosen = {str(name).strip()[:_MAX_LIST] for name in st.session_state[key]} - {""}
    for name in chosen - set(before):
        _add(feature, "list", True, name)
    for name in set(before) - chosen:
        _add(feature, "list", None, name)


def _add(feature: Feature, kind: str, value: object, name: str) -> None:
    try:
        feature.store.annotations.add(feature.feature, kind, value, name)
        st.toast("Saved", icon=":material/check:")
    except StoreError as error:
        st.error(markdown.plain(str(error)), icon=":material/error:")
