"""Why features are silent: how near each came to firing, what is near it, and what may revive it."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import urlencode

import streamlit as st

from saelab.app import markdown, state
from saelab.errors import SaelabError
from saelab.features import FeatureStore
from saelab.features.render import cosine, fixed
from saelab.features.visible import escape

_TWIN = 0.9
_OPPOSED = 0.0
_NEAR = -0.1
REMEDIES = {
    "rare: it fires, on few tokens": "Collect on more text before judging it.",
    "a twin of a feature that fires in its place": "Fewer features, or a lower learning rate, leave no room for twins.",
    "its encoder points away from what its decoder writes": "Train on with an auxiliary loss (auxk_alpha): it turns the encoder.",
    "never fired": "Train on with an auxiliary loss (auxk_alpha).",
    "it came close to firing": "More training, or a larger k, may be enough.",
    "far from firing on every token": "Train on with an auxiliary loss (auxk_alpha), or with fewer features.",
}


class Diagnosis(NamedTuple):
    """What is known of one silent feature."""

    feature: int
    n_fired: int
    reason: str
    margin: float | None
    cosine: float | None
    bias: float | None
    nearest: int
    cosine_to_nearest: float
    nearest_fired: int


def show_reasons(store: FeatureStore, features: list[int]) -> None:
    """A table with a diagnosis of each feature."""
    st.subheader("Diagnosis")
    try:
        found = [diagnosis(store, feature) for feature in features]
    except SaelabError as error:
        st.info(markdown.plain(str(error)), icon=":material/update:")
        return
    st.html(f'<ul class="sa-reasons">{"".join(map(_item, found))}</ul>')
    st.caption(
        "Margin: how much it lacked at its best, on one token in 64; the nearer to 0, the easier it is to revive."
    )


def show_reason(store: FeatureStore, feature: int) -> None:
    """Why this feature never fired, and what may help."""
    try:
        found = diagnosis(store, feature)
    except SaelabError:
        return  # a store that holds no near misses
    lacked = "" if found.margin is None else f" At its best it lacked {-found.margin:.3f} to fire."
    st.caption(markdown.plain(f"Likeliest reason: {found.reason}.{lacked} {REMEDIES[found.reason]}"))
    state.link("dead", "All dead features", ":material/bedtime:")


def diagnosis(store: FeatureStore, feature: int) -> Diagnosis:
    """The diagnosis of one feature. Raises `StoreError` for a store without near misses."""
    row = store.row_of(feature)
    misses = store.examples(feature, 1, kind="near_miss")
    (near,) = store.neighbours(feature, k=1)
    other, bias = store.row_of(near["feature"]), store.weights.get("b_enc")
    margin = misses[0].value if misses else None
    return Diagnosis(
        feature,
        row["n_fired"],
        reason(row, margin, near["cosine"], other["n_fired"]),
        margin,
        row["cosine"],
        None if bias is None or bias.ndim != 1 else float(bias[feature]),
        near["feature"],
        near["cosine"],
        other["n_fired"],
    )


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
    return "it came close to firing" if margin > _NEAR else "far from firing on every token"


def _item(found: Diagnosis) -> str:
    fired = f"fired {found.n_fired:,}\u00d7" if found.n_fired else f"margin {fixed(found.margin, 3)}"
    more = (
        f"{fired}, encoder and decoder cosine {cosine(found.cosine)}, encoder bias {fixed(found.bias, 3)}; nearest feature "
        f"{_link(found.nearest)} (cosine {cosine(found.cosine_to_nearest)}, fired {found.nearest_fired:,}\u00d7)"
    )
    said = f"{escape(found.reason)}. {escape(REMEDIES[found.reason])}"
    return f"<li><b>{_link(found.feature)}</b> {said} <small>{more}</small></li>"


def _link(feature: int) -> str:
    address = escape("feature?" + urlencode({"feature": feature} | state.sae_parameter()))
    return f'<a href="{address}" target="_self">{feature}</a>'
