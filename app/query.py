"""Which features the table shows, and in which order: read from the URL, so that Next and Previous follow it on every page."""

from __future__ import annotations

from typing import Any, NamedTuple

import streamlit as st

from saelab.app import url
from saelab.features import FeatureStore
from saelab.features.steer_scores import STEER_SCORE, STEERS, steer_scores

SORTS = {
    "sharpness": (
        "Sharpness",
        "How many bits a firing tells about the word it is on: the larger, the more it means one thing.",
    ),
    "density": ("Density", "Share of counted tokens on which it fires."),
    "p99": ("p99", "99th percentile of its activations: the unit of steering strengths."),
    "max": ("Max", "Its largest activation."),
    "mean": ("Mean", "Mean of its activations."),
    "cosine": ("Enc\u2013dec", "Cosine similarity of its encoder and decoder rows."),
    STEER_SCORE: ("Steering", "How far steering with it reads back in fluent text, of the features that were tried."),
    "feature": ("Index", "Row of the weights."),
}
ORDERS = {"down": "High to low", "up": "Low to high"}
SHOWS: dict[str, tuple[str, dict[str, tuple[float | int | None, float | int | None]]]] = {
    "firing": ("Firing", {"n_fired": (1, None)}),
    "common": ("0.01 % to 1 %", {"density": (1e-4, 1e-2)}),
    "steers": ("Steers", {STEER_SCORE: (STEERS, None)}),
    "dense": ("Over 10 %", {"density": (0.1, None)}),
    "all": ("All", {}),
}
MAX_SEARCH = 200
_MOST_FOUND = 1000


def sorts(store: FeatureStore) -> list[str]:
    """The orders that a store has: by steering score where a feature was tried."""
    return [name for name in SORTS if name != STEER_SCORE or steer_scores(store.annotations)]


def shows(store: FeatureStore) -> list[str]:
    """The ranges of features that a store has, likewise."""
    return [name for name in SHOWS if name != "steers" or steer_scores(store.annotations)]


class Query(NamedTuple):
    """A search, or an order and a range of density."""

    words: str
    sort: str
    order: str
    show: str
    among: str
    """The list that features are taken from, or ""."""

    @property
    def where(self) -> dict[str, Any]:
        return SHOWS[self.show][1]

    def parameters(self) -> dict[str, str]:
        """What differs from the default view, for links."""
        names = {"q": self.words, "sort": self.sort, "order": self.order, "show": self.show, "list": self.among}
        default = {"q": "", "sort": "sharpness", "order": "down", "show": "firing", "list": ""}
        return {name: value for name, value in names.items() if value != default[name]}


def from_url(store: FeatureStore) -> Query:
    """The query in the URL; unknown values show a notice."""
    lists = sorted(store.lists)
    known = store.manifest["version"] >= 3
    sort = url.choice("sort", "sharpness" if known else "density", sorts(store))
    order, show = url.choice("order", "down", list(ORDERS)), url.choice("show", "firing", shows(store))
    among = url.choice("list", "", ["", *lists])
    return Query(st.query_params.get("q", "")[:MAX_SEARCH], sort, order, show, among)


def ids(store: FeatureStore, query: Query) -> list[int]:
    """The features of a query, in its order."""
    return list(found(store, query))


def found(store: FeatureStore, query: Query) -> dict[int, str]:
    """The features of a query, in its order, with where a search found its words ("" without a search)."""
    if query.words.strip():
        return {row["feature"]: row.get("found_in", "") for row in store.search(query.words, _MOST_FOUND)}
    if query.among:
        chosen = set(store.lists.get(query.among, []))
        return {feature: "" for feature in _ordered(store, query) if feature in chosen}
    return dict.fromkeys(_ordered(store, query), "")


def as_python(query: Query, limit: int, offset: int) -> str:
    """The line that computes one page of the table, as `rows`."""
    if query.words.strip():
        return f"rows = store.search({query.words!r}, {offset + limit})[{offset}:]"
    order = f"{query.sort!r}, descending={query.order == 'down'}, where={query.where}"
    if not query.among:
        return f"rows = store.table({order}, limit={limit}, offset={offset})"
    return (
        f"chosen = [i for i in store.features({order}) if i in store.lists[{query.among!r}]]\n"
        f"rows = store.rows_of(chosen[{offset}:{offset + limit}])"
    )


def _ordered(store: FeatureStore, query: Query) -> list[int]:
    version = store.manifest["files"]["store.sqlite"]["sha256"]
    if STEER_SCORE in (query.sort, *query.where):
        version += str(sorted(steer_scores(store.annotations).items()))
    return _cached_order(version, query.sort, query.order, query.show, store)


@st.cache_data(max_entries=64, show_spinner=False)
def _cached_order(version: str, sort: str, order: str, show: str, _store: FeatureStore) -> list[int]:
    return _store.features(sort, order == "down", SHOWS[show][1])
