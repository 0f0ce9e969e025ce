"""What is near a feature: the features of similar directions, and those that fire on the same tokens."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import streamlit as st

from saelab.app import markdown, state, url
from saelab.errors import StoreError
from saelab.features import Feature, FeatureStore
from saelab.features.visible import escape

_SHOWN = 8
_BY = {"decoder": "Decoder", "encoder": "Encoder"}


def show(feature: Feature, parameters: dict[str, str]) -> None:
    """Show both tables; links keep `parameters`."""
    store = feature.store
    st.subheader("Neighbours")
    by = url.choice("by", "decoder", list(_BY))
    st.segmented_control(
        "By", list(_BY), format_func=_BY.__getitem__, required=True, wrap=True, label_visibility="collapsed",
        help="Cosine similarity of decoder rows or of encoder rows.", **url.bound("by", by),
    )  # fmt: skip
    try:
        rows = [(one["feature"], f"{one['cosine']:.2f}") for one in store.neighbours(feature.feature, by=by, k=_SHOWN)]
        st.html(table(store, ("Feature", "Cosine"), rows, parameters))
    except StoreError as error:
        st.info(markdown.plain(str(error)), icon=":material/link_off:")
    st.subheader("Fires together with")
    found = store.coactivation(feature.feature, _SHOWN)
    if not found:
        st.caption("It fired on no token of the sample.")
        return
    st.caption(
        "Counted on a sample of tokens. Jaccard: tokens with both over tokens with either; lift: how much likelier than by "
        "chance; P(it | this): how often that feature fires where this one does."
    )
    heads = ("Feature", "Jaccard", "Lift", "P(it | this)", "P(this | it)")
    names = ("jaccard", "lift", "p_given_this", "p_this_given")
    st.html(
        table(store, heads, [(one["feature"], *(_short(one[name]) for name in names)) for one in found], parameters)
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def table(store: FeatureStore, heads: tuple[str, ...], rows: list[tuple[Any, ...]], parameters: dict[str, str]) -> str:
    """Rows whose first value is a feature, with its label and a link to it that keeps `parameters`; the others are HTML."""
    given, rows_of = store.labels, {row["feature"]: row for row in store.rows_of([row[0] for row in rows])}
    lines, view = [], {**parameters, **state.sae_parameter()}
    for index, *values in rows:
        label = given.get(index) or rows_of[index]["label"] or "\u2013"
        address = escape("feature?" + urlencode({**view, "feature": index}))
        cells = "".join(f"<td>{value}</td>" for value in values)
        lines.append(
            f'<tr><td><a href="{address}" class="sl-go" target="_self">{index}</a> <bdi>{escape(label)}</bdi></td>{cells}</tr>'
        )
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f'<table class="sa-table"><tr>{head}</tr>{"".join(lines)}</table>'
