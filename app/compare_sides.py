"""The sides of a crosscoder: relative decoder norms, cosines between the two decoders, and the features of one side only."""

from __future__ import annotations

import streamlit as st

from saelab.app import as_python, compare_charts, compare_diff, url
from saelab.app.compare_table import Column, show_table
from saelab.features import FeatureStore
from saelab.features.render import cosine, percent
from saelab.features.sides import CLASSES, Sides, sides
from saelab.runs import SaeRun

_CONFIG = {"displayModeBar": False}


def show(first: SaeRun, store: FeatureStore, sources: list[str], address: str) -> None:
    """Render this part of the page; `address` is the start of a link to a feature, which its number completes."""
    a, b = _chosen(sources)
    if a == b:
        st.info("Choose two different sources.", icon=":material/compare_arrows:")
        return
    found = sides(store, a, b)
    as_python.offer("from saelab.features.sides import sides", "", f"found = sides(store, {a}, {b})", store=store)
    compare_diff.show(first, store, (sources[a], sources[b]), len(sources) > 2, address)
    left, right = st.columns(2, gap="large")
    shared = int((found.kind == 1).sum())
    left.plotly_chart(
        compare_charts.relative_norms(found.relative), key="norms", config=_CONFIG,
        alt=f"Histogram of relative decoder norms; {shared:,} of {store.d_sae:,} features are shared",
    )  # fmt: skip
    right.plotly_chart(
        compare_charts.side_cosines(found.cosine, found.kind), key="side_cosines", config=_CONFIG,
        alt="Histogram of the cosine between the two decoder rows of each feature",
    )  # fmt: skip
    st.caption(
        "Relative norm: 0 where a feature writes to the first source only, 1 to the second only, 0.5 to both alike."
    )
    _table(store, found, address)


def _chosen(sources: list[str]) -> tuple[int, int]:
    """The two sources, by number."""
    numbers = [str(number) for number in range(len(sources))]
    a = url.choice("left", "0", numbers)
    b = url.choice("right", numbers[-1], numbers)
    names = dict(zip(numbers, sources, strict=True))
    for column, label, name, value in zip(
        st.columns(2), ("First source", "Second source"), ("left", "right"), (a, b), strict=True
    ):
        column.selectbox(label, numbers, format_func=names.__getitem__, **url.bound(name, value))
    return int(a), int(b)


def _table(store: FeatureStore, found: Sides, address: str) -> None:
    kinds = {"a": "a only", "shared": "shared", "b": "b only", "other": "other", "all": ""}
    said = {"a": "First only", "shared": "Shared", "b": "Second only", "other": "Between", "all": "All"}
    counts = {key: int((found.kind == CLASSES.index(kind)).sum()) for key, kind in kinds.items() if kind}
    kind = url.choice("side", "a", list(kinds))
    st.selectbox(
        "Features", list(kinds), width=260, **url.bound("side", kind),
        format_func=lambda key: f"{said[key]} ({counts[key]:,})" if key in counts else said[key],
    )  # fmt: skip
    features = found.features(kinds[kind]).tolist()
    if not features:
        st.info("No feature is of this kind.", icon=":material/filter_alt_off:")
        return
    with url.page_of(len(features)) as here:
        show_table(
            _columns(store, found, features[here], address),
            f"{len(features):,} features, from those of the first source to those of the second",
        )


def _columns(store: FeatureStore, found: Sides, shown: list[int], address: str) -> list[Column]:
    rows = {row["feature"]: row for row in store.rows_of(shown)}
    norms = [[f"{norm[i]:.3g}" for i in shown] for norm in (found.norm_a, found.norm_b)]
    return [
        Column("Feature", features=shown, store=store, address=address),
        Column("Density", [percent(rows[i]["density"]) for i in shown]),
        Column("Relative norm", [cosine(float(found.relative[i])) for i in shown]),
        Column("Norm at first", norms[0]),
        Column("Norm at second", norms[1]),
        Column("Cosine", [cosine(float(found.cosine[i])) for i in shown]),
    ]
