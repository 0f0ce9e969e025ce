"""A table in which a column may hold features, with their labels and links to them."""

from __future__ import annotations

from dataclasses import dataclass, field

import streamlit as st

from saelab.features import FeatureStore
from saelab.features.visible import escape

_DASH = "\u2013"


@dataclass
class Column:
    """A column of texts, or of features of a store (-1: none)."""

    name: str
    texts: list[str] = field(default_factory=list)
    features: list[int] = field(default_factory=list)
    store: FeatureStore | None = None
    address: str = ""
    """The start of a link, which the feature completes."""

    @property
    def kind(self) -> str:
        """Its CSS class."""
        return "sa-of" if self.store is not None else "sa-cell"

    def cells(self) -> list[str]:
        """Their HTML."""
        if self.store is None:
            return [f"<td>{escape(text)}</td>" for text in self.texts]
        rows = {row["feature"]: row for row in self.store.rows_of([one for one in set(self.features) if one >= 0])}
        given = self.store.labels
        return [self._feature(one, given.get(one) or rows[one]["label"] if one >= 0 else None) for one in self.features]

    def _feature(self, feature: int, label: str | None) -> str:
        if feature < 0:
            return f'<td class="sa-of">{_DASH}</td>'
        link = f'<a href="{escape(self.address)}{feature}" target="_self">{feature}</a>'
        return f'<td class="sa-of">{link} <bdi>{escape(label or _DASH)}</bdi></td>'


def show_table(columns: list[Column], caption: str, *, dim: bool = False) -> None:
    """Show the columns side by side, `dim` where they count for little."""
    head = "".join(f'<th scope="col" class="{one.kind}">{escape(one.name)}</th>' for one in columns)
    lines = "".join(f"<tr>{''.join(cells)}</tr>" for cells in zip(*(one.cells() for one in columns), strict=True))
    st.html(
        f'<table class="sa-table sa-pairs{" sa-dim" if dim else ""}"><caption class="sa-sub">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    )
