"""The edits of the Steer page: kept in the address as `17:add:2,88:clamp:1`, shown as rows, and built as a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import streamlit as st

from saelab.app import url
from saelab.features import FeatureStore
from saelab.features.manifest import SIGNS_MIXED

MAX_EDITS, MAX_STRENGTH = 16, 100.0
_ENTRY = re.compile(r"(\d{1,9}):([a-z_]{1,20}):(-?[0-9.eE+-]{1,20})")


class Kind(NamedTuple):
    """A kind of edit as the page names it, and as Python writes it."""

    label: str
    call: str
    """With `{}` for the strength."""
    in_p99: bool
    """Whether its strength is in p99."""


KINDS = {
    "add": Kind("Add", "add({})", True),
    "clamp": Kind("Set to", "clamp({})", True),
    "clamp_firing": Kind("Set to, where it fires", "clamp({}, where='fires')", True),
    "cap": Kind("At most", "cap(max={})", True),
    "floor": Kind("At least", "cap(min={})", True),
    "scale": Kind("Multiply by", "scale({})", False),
    "ablate": Kind("Zero", "ablate()", False),
    "project_out": Kind("Remove its direction", "project_out()", False),
}


class PageEdit(NamedTuple):
    """One edit."""

    feature: int
    kind: str
    strength: float
    end: str = ""
    """ "positive" or "negative" of a feature with two ends; "": the dominant one."""

    @property
    def code(self) -> str:
        """The edit as Python."""
        end = f".{self.end}" if self.end else ""
        feature = f"store.feature({self.feature}){end}"
        return (
            f"{feature} * {self.strength!r}"
            if self.kind == "add"
            else f"{feature}.{KINDS[self.kind].call.format(repr(self.strength))}"
        )

    def build(self, store: FeatureStore) -> Any:
        """The edit for `lm.steer`."""
        feature = store.feature(self.feature)
        one: Any = next((end for end in feature.ends if end.name == self.end), feature)
        value = self.strength
        made = {
            "add": lambda: one.add(value), "clamp": lambda: one.clamp(value),
            "clamp_firing": lambda: one.clamp(value, where="fires"), "cap": lambda: one.cap(max=value),
            "floor": lambda: one.cap(min=value), "scale": lambda: one.scale(value), "ablate": one.ablate,
            "project_out": one.project_out,
        }  # fmt: skip
        return made[self.kind]()


def parse(text: str, d_sae: int) -> tuple[PageEdit, ...]:
    """The edits of an address. Raises `ValueError` for anything else."""
    found = []
    for entry in text.split(",") if text else []:
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(f"{entry!r} is no edit")
        edit = PageEdit(int(match[1]), match[2], float(match[3]))
        if edit.feature >= d_sae or edit.kind not in KINDS or not abs(edit.strength) <= MAX_STRENGTH:
            raise ValueError(f"{entry!r} is out of range")
        found.append(edit)
    if len(found) >= MAX_EDITS:
        raise ValueError(f"more than {MAX_EDITS} edits")
    return tuple(found)


def told(edits: Sequence[PageEdit]) -> str:
    """Edits as an address holds them."""
    return ",".join(f"{one.feature}:{one.kind}:{one.strength:g}" for one in edits)


def check(store: FeatureStore, edits: Sequence[PageEdit]) -> None:
    """Raises `ValueError` for an edit that the widgets would not allow, or that the feature has no unit for."""
    if not 1 <= len(edits) <= MAX_EDITS:
        raise ValueError(f"{len(edits)} edits; give 1 to {MAX_EDITS}.")
    for one in edits:
        if not math.isfinite(one.strength) or abs(one.strength) > MAX_STRENGTH:
            raise ValueError(f"strength={one.strength} must be a number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}.")
        feature = store.feature(one.feature)
        if store.signed is None:
            raise ValueError(f"Feature {one.feature}: {SIGNS_MIXED}")
        if feature.p99 is None:
            raise ValueError(
                f"Feature {one.feature} never fired, so it has no p99 to measure strength in: choose another."
            )


def show_rows(store: FeatureStore) -> tuple[PageEdit, ...]:
    """The further edits of the address, each as a row of widgets that write it back."""
    expected = f"at most {MAX_EDITS - 1} edits such as 17:add:2, features to {store.d_sae - 1}"
    edits = url.parsed("edits", (), lambda text: parse(text, store.d_sae), expected)
    for i, edit in enumerate(edits):
        keys = {name: f"edit_{i}_{name}" for name in ("feature", "kind", "strength")}
        for name, key in keys.items():
            st.session_state[key] = getattr(edit, name)
        with st.container(horizontal=True, vertical_alignment="bottom"):
            write = {"on_change": _write_rows, "args": (edits,)}
            st.number_input(
                f"Feature of edit {i + 2}", 0, store.d_sae - 1, step=1, width=120, key=keys["feature"], **write
            )
            st.selectbox(f"Edit {i + 2}", list(KINDS), format_func=_label, width=170, key=keys["kind"], **write)
            st.number_input(
                f"Strength of edit {i + 2}", -MAX_STRENGTH, MAX_STRENGTH, step=0.5, format="%g", width=120,
                disabled=not takes_strength(edit.kind), key=keys["strength"], **write,
            )  # fmt: skip
            kept = told([*edits[:i], *edits[i + 1 :]])
            st.button("Remove", key=f"edit_{i}_remove", icon=":material/close:", on_click=_set, args=(kept,))
    more = told([*edits, PageEdit(min(edits[-1].feature + 1, store.d_sae - 1) if edits else 0, "add", 1.0)])
    full = len(edits) >= MAX_EDITS - 1
    st.button("Add a feature", icon=":material/add:", disabled=full, on_click=_set, args=(more,))
    return edits


def takes_strength(kind: str) -> bool:
    """Whether a kind of edit has a strength."""
    return "{}" in KINDS[kind].call


def _label(kind: str) -> str:
    return KINDS[kind].label


def _write_rows(edits: tuple[PageEdit, ...]) -> None:
    names = ("feature", "kind", "strength")
    rows = ([st.session_state[f"edit_{i}_{name}"] for name in names] for i in range(len(edits)))
    _set(told([PageEdit(*row) for row in rows]))


def _set(text: str) -> None:
    if text:
        st.query_params["edits"] = text
    else:
        st.query_params.pop("edits", None)
