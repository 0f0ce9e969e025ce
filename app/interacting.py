"""Which features interact with one, where the decoder has products of features; nothing for any other SAE."""

from __future__ import annotations

from typing import Any

import streamlit as st

from saelab.app import related, state
from saelab.features import Feature
from saelab.features.numbers import number, percent
from saelab.features.schema import MIN_BOTH
from saelab.features.visible import chip_text

_SHOWN = 8


def show(feature: Feature, parameters: dict[str, str]) -> None:
    """Show the table, and a button that names the tokens; links keep `parameters`."""
    if feature.store.additive or not feature.n_fired:
        return
    st.subheader("Interacts with")
    st.caption(
        "What the decoder adds for the product of both activations. Size: its norm where both are at their p99; Norm: per unit "
        "of both; Cosine: with this decoder row, and with the other's; P(it | this) and lift: how often they fire together. The "
        f"largest Size first; pairs that fire together on fewer than {MIN_BOTH} tokens of the store's sample are left out, as "
        "nothing is known of them there."
    )
    named = st.session_state.get("interactions_named") == (str(feature.store.folder), feature.feature)
    rows = _with_tokens(feature) if named else feature.interactions(_SHOWN)
    if not rows:
        st.caption("No other feature fires together with this one that often.")
        return
    heads = ("Feature", "Size", "Norm", "Cosine", "P(it | this)", "Lift", *(["Promote together"] if named else []))
    st.html(related.table(feature.store, heads, [_row(one) for one in rows], parameters))
    if not named and st.button("Name the tokens they promote", icon=":material/abc:", key="name-interactions"):
        st.session_state["interactions_named"] = (str(feature.store.folder), feature.feature)
        st.rerun()


def _row(one: dict[str, Any]) -> tuple[Any, ...]:
    together = [
        "\u2013" if one["p_given_this"] is None else percent(one["p_given_this"]),
        "\u2013" if one["lift"] is None else f"{one['lift']:.1f}",
    ]
    row = (one["feature"], number(one["at_p99"]), number(one["norm"]))
    cosines = f"{one['cosine']:+.2f}, {one['cosine_other']:+.2f}"
    chips = [" ".join(f'<bdi class="sl-chip">{chip_text(token)}</bdi>' for token in one.get("promoted", ()))]
    return (*row, cosines, *together, *(chips if "promoted" in one else []))


def _with_tokens(feature: Feature) -> list[dict[str, Any]]:
    """The interactions with their tokens, by the model, one session at a time."""
    with st.spinner("Loading the model"), state.MODEL_LOCK:
        return feature.interactions(_SHOWN, state.load_model(feature.store.manifest["model"]["name"]))
