"""Compare page: two SAEs, or two snapshots of one, matched feature by feature; and the two sides of a crosscoder."""

from __future__ import annotations

from urllib.parse import urlencode

import numpy as np
import streamlit as st

from saelab.app import as_python, compare_charts, compare_sides, markdown, state, url
from saelab.app.compare_table import Column, show_table
from saelab.features import FeatureStore
from saelab.features.changes import Changes, changes
from saelab.features.matching import Matching, match
from saelab.features.pairs import Pair, pairs
from saelab.features.schema import DATABASE, MANIFEST
from saelab.features.sides import sources_of
from saelab.runs import SaeRun, follows

_COSINES = ["0.5", "0.6", "0.7", "0.8", "0.9"]
_ORDERS = {
    "unlike": "Least alike",
    "alike": "Most alike",
    "apart": "Firing least alike",
    "together": "Firing most alike",
    "index": "Index",
}


def show() -> None:
    """Render the page."""
    st.title("Compare")
    given = [one for one in state.with_snapshots() if (one.features_dir / MANIFEST).exists()]
    first = state.chosen_sae()
    if first not in given and given and "sae" not in st.query_params:  # in training: its snapshots may have features
        first = given[0]
    store = state.store_of(first)
    others = [one for one in given if one != first]
    sources = sources_of(store)
    views = {"sides": "Its sides"} if len(sources) > 1 else {}
    views |= {"pair": "Another SAE"} if others else {}
    if not views:
        st.info(
            "There is only one SAE with features here. Train another one with `saelab train RUN --name NAME`, or keep snapshots "
            "of a training with `--snapshot-every N`, and collect their features: `saelab features RUN`, `saelab features RUN "
            "--snapshots`.",
            icon=":material/compare_arrows:",
        )
        return
    view = url.choice("view", next(iter(views)), list(views))
    if len(views) > 1:
        st.segmented_control(
            "Compare with",
            list(views),
            format_func=views.__getitem__,
            required=True,
            wrap=True,
            **url.bound("view", view),
        )
    if view == "sides":
        compare_sides.show(first, store, sources, _address(first))
    else:
        _pair(first, store, given)


def _pair(first: SaeRun, store: FeatureStore, given: list[SaeRun]) -> None:
    others = [one for one in given if one != first]
    names = {one.name: one for one in others}
    if st.query_params.get("with") == first.name:  # the first was changed to what the second was
        del st.query_params["with"]
    second = names[url.choice("with", _default(first, given).name, list(names))]
    left, right = st.columns(2)
    left.selectbox("First", [one.name for one in given], **url.bound("sae", first.name))
    right.selectbox("Second", list(names), **url.bound("with", second.name))
    other = state.store_of(second)
    _warn(store, other)
    with st.spinner("Matching features"):
        matching = _matched(_key(store), _key(other), store, other)
    text = url.choice("same", "0.7", _COSINES)
    found = changes(matching, float(text))
    _numbers(matching, found, first, second)
    as_python.offer(
        "from saelab.features.changes import changes",
        "from saelab.features.matching import match",
        "",
        f"other = saelab.load_features({str(other.folder)!r})",
        "matching = match(store, other)",
        f"found = changes(matching, {text})",
        store=store,
    )
    figure = compare_charts.cosines(matching.of_a.cosine, matching.of_b.cosine, (first.name, second.name), float(text))
    st.plotly_chart(
        figure, key="cosines", config={"displayModeBar": False},
        alt="Histogram of the cosine between each feature's decoder row and the most similar of the other SAE",
    )  # fmt: skip
    _table(matching, found, float(text), (store, other), (first, second))


def _default(first: SaeRun, given: list[SaeRun]) -> SaeRun:
    """The one that follows in the run, else the one before."""
    place = given.index(first)
    return given[place + 1] if place + 1 < len(given) else given[place - 1]


def _key(store: FeatureStore) -> str:
    return f"{store.manifest['sae']['hash']} {store.manifest['files'][DATABASE]['sha256']}"


@st.cache_resource(max_entries=8, show_spinner=False)
def _matched(first: str, second: str, _store: FeatureStore, _other: FeatureStore) -> Matching:
    return match(_store, _other)


def _warn(store: FeatureStore, other: FeatureStore) -> None:
    """Say so where directions of one SAE mean something else in the other."""
    if store.manifest["model"]["hash"] != other.manifest["model"]["hash"]:
        st.info(
            "These SAEs are of models with different weights: their directions are comparable only as far as the models are.",
            icon=":material/info:",
        )
    elif store.hook_name != other.hook_name:
        hooks = f"{markdown.plain(store.hook_name)} and {markdown.plain(other.hook_name)}"
        st.info(f"These SAEs write to different hooks, {hooks}.", icon=":material/info:")


def _numbers(matching: Matching, found: Changes, first: SaeRun, second: SaeRun) -> None:
    died, born = ("Died", "Born") if follows(first, second) else ("Only in first", "Only in second")
    middle = matching.median_jaccard
    shared = f"on the {matching.n_shared:,} tokens that both stores sampled"
    several = "that are the counterpart of several which fire within them."
    entries = [
        ("Most alike both ways", matching.mutual.sum(), "Pairs in which each is the most similar one of the other."),
        ("Their Jaccard", None, f"Tokens on which both fire over those on which either does: the median, {shared}."),
        (died, len(found.died), "Features of the first without a counterpart."),
        (born, len(found.born), "Features of the second without a counterpart."),
        ("Split", len(found.split), f"Features of the first {several}"),
        ("Merged", len(found.merged), f"Features of the second {several}"),
    ]
    with st.container(horizontal=True):
        for name, count, meaning in entries:
            value = f"{count:,}" if count is not None else "\u2013" if middle is None else f"{middle:.2f}"
            st.metric(name, value, help=meaning, width=150)
    st.caption(
        f"{matching.of_a.alive.sum():,} and {matching.of_b.alive.sum():,} features fired and are matched, by the cosine of "
        "their decoder rows. Firings are compared on tokens that both stores sampled"
        + ("." if matching.n_shared else ", of which there are none: they were collected on other texts.")
    )


def _table(
    matching: Matching,
    found: Changes,
    cosine: float,
    stores: tuple[FeatureStore, FeatureStore],
    saes: tuple[SaeRun, SaeRun],
) -> None:
    later = follows(*saes)
    shows = {
        "all": "All",
        "mutual": "Both ways",
        "only_a": "Died" if later else "Only in first",
        "only_b": "Born" if later else "Only in second",
        "split": "Split",
        "merged": "Merged",
    }
    show = url.choice("show", "mutual", list(shows))
    order = url.choice("order", "unlike", list(_ORDERS))
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        st.selectbox("Features", list(shows), format_func=shows.__getitem__, width=200, **url.bound("show", show))
        st.selectbox("Order", list(_ORDERS), format_func=_ORDERS.__getitem__, width=200, **url.bound("order", order))
        st.selectbox(
            "Counterpart from cosine", _COSINES, width=200, **url.bound("same", f"{cosine:g}"),
            help="A feature of the other SAE counts as a counterpart if it is the most similar and at least that similar.",
        )  # fmt: skip
    rows = pairs(matching, show, order, cosine)
    if not rows:
        st.info("No feature is of this kind.", icon=":material/filter_alt_off:")
        return
    caption = f"{len(rows):,} pairs, {shows[show].lower()}, {_ORDERS[order].lower()} first"
    with url.page_of(len(rows)) as here:
        show_table(_columns(rows[here], stores, saes), caption)


def _columns(shown: list[Pair], stores: tuple[FeatureStore, FeatureStore], saes: tuple[SaeRun, SaeRun]) -> list[Column]:
    ends = [[pair.a for pair in shown], [pair.b for pair in shown]]
    features = [
        Column(f"{which}: {sae.name}", features=end, store=store, address=_address(sae))
        for which, end, store, sae in zip(("First", "Second"), ends, stores, saes, strict=True)
    ]
    cosine = Column("Cosine", [f"{pair.cosine:.2f}" for pair in shown])
    jaccard = Column("Jaccard", ["\u2013" if np.isnan(pair.jaccard) else f"{pair.jaccard:.2f}" for pair in shown])
    both = Column("Both ways", ["yes" if pair.mutual else "no" for pair in shown])
    return [*features, cosine, jaccard, both]


def _address(sae: SaeRun) -> str:
    return "feature?" + urlencode({"sae": sae.name}) + "&feature="
