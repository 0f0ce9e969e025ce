"""Why features are silent: how near each came to firing, and what is near it."""

from __future__ import annotations

from typing import Any

import streamlit as st

from saelab.app import markdown
from saelab.errors import SaelabError
from saelab.features import FeatureStore
from saelab.features.render import cosine

_TWIN = 0.9
_OPPOSED = 0.0


def show_reasons(store: FeatureStore, features: list[int]) -> None:
    """A table with a diagnosis of each feature."""
    st.subheader("Diagnosis")
    try:
        rows = [diagnosis(store, feature) for feature in features]
    except SaelabError as error:
        st.info(markdown.plain(str(error)), icon=":material/update:")
        return
    st.dataframe(rows, hide_index=True, alt="How near each rare feature came to firing, and why")
    st.caption(
        "Margin: the largest pre-activation minus what it had to exceed, on one token in 64; the nearer to 0, the easier it is "
        "to revive. To revive dead features, train on with an auxiliary loss (`auxk_alpha`), a lower learning rate or fewer "
        "features."
    )


def diagnosis(store: FeatureStore, feature: int) -> dict[str, Any]:
    """What is known of one silent feature, as a row."""
    row = store.row_of(feature)
    misses = store.examples(feature, 1, kind="near_miss")
    (near,) = store.neighbours(feature, k=1)
    other = store.row_of(near["feature"])
    bias = store.weights.get("b_enc")
    return {
        "Feature": feature,
        "Fired": row["n_fired"],
        "Reason": reason(row, misses[0].value if misses else None, near["cosine"], other["n_fired"]),
        "Margin": None if not misses else round(misses[0].value, 3),
        "Enc\u2013dec": cosine(row["cosine"]),
        "Encoder bias": None if bias is None or bias.ndim != 1 else round(float(bias[feature]), 3),
        "Nearest feature": near["feature"],
        "Cosine to it": round(near["cosine"], 2),
        "It fired": other["n_fired"],
    }


def reason(row: dict[str, Any], margin: float | None, near: float, near_fired: int) -> str:
    """The likeliest reason, in a few words."""
    if row["n_fired"] > 0:
        return "rare: it fires, on few tokens"
    if near > _TWIN and near_fired:
        return "a twin of a feature that fires in its place"
    if row["cosine"] is not None and row["cosine"] < _OPPOSED:
        return "its encoder points away from what its decoder writes"
    if margin is None:
        return "never fired"
    return "it came close to firing" if margin > -0.1 else "far from firing on every token"
