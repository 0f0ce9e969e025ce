"""The examples of a feature, of every kind; each opens to its whole document."""

from __future__ import annotations

from urllib.parse import urlencode

import streamlit as st

from saelab.app import markdown, state, url
from saelab.errors import StoreError
from saelab.features import Feature
from saelab.features.render import DocumentLinks, examples_html

_KINDS = {
    "top": ("Strongest", "The strongest example from each document."),
    "quantile": (
        "Quantiles",
        "Four examples from each of five groups of equally many firings, the strongest group first: does it still mean the same?",
    ),
    "uniform": ("Uniform", "A uniform sample of all tokens on which the feature fires."),
    "near_miss": ("Near misses", "Tokens on which it nearly fired; the number is what it lacked, in units of the SAE."),
}
_LIMIT = 20


def show(feature: Feature) -> None:
    """Show them under the choice of their kind."""
    st.subheader("Examples")
    kind = url.choice("kind", "top", list(_KINDS))
    names = {key: name for key, (name, _) in _KINDS.items()}
    st.segmented_control(
        "Which", list(_KINDS), format_func=names.__getitem__, required=True, wrap=True, label_visibility="collapsed",
        **url.bound("kind", kind),
    )  # fmt: skip
    signs = " of that sign (blue: negative)" if feature.store.signed else ""
    st.caption(
        f"{_KINDS[kind][1]} Background: activation relative to the feature's maximum{signs}; outline: the peak. Point at a token "
        "for its activation and its place in the histogram, or Tab to a peak and move with the arrow keys. The link under the "
        "number names the document and the token's place in it, and opens the document."
    )
    try:
        _lists(feature, kind)
    except StoreError as error:
        st.info(markdown.plain(str(error)), icon=":material/update:")


def _lists(feature: Feature, kind: str) -> None:
    """The examples, and for the strongest ones those of the other end of a signed feature."""
    lists = [(kind, "", feature.examples(None if kind == "top" else _LIMIT, kind=kind))]
    if kind == "top" and len(feature.ends) > 1:
        lists.append(("bottom", f"The other end ({feature.ends[1].name})", feature.examples(kind="bottom")))
    shown = [example.place for _, _, examples in lists for example in examples]
    view = {name: value for name, value in st.query_params.items() if name != "doc"}
    view |= {"feature": str(feature.feature)} | state.sae_parameter()
    links = DocumentLinks(lambda place: _address(view, place), url.choice("doc", "", ["", *shown]))
    largest = {end.sign: end.max for end in feature.ends}
    for name, title, examples in lists:
        if title:
            st.subheader(title)
        st.html(examples_html(examples, largest.get(1, feature.max), largest.get(-1), name, links))


def _address(view: dict[str, str], place: str) -> str:
    """The address of this view with that example open."""
    return "feature?" + urlencode(view | ({"doc": place} if place else {}))
