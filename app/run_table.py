"""The table of all SAEs of the run, sorted by clicking a header. Where it is narrow each row becomes a card of named values."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import streamlit as st

from saelab.app import markdown, url
from saelab.features.render import fixed
from saelab.features.visible import escape
from saelab.run_folder.summary import Summary, ordered, scored_apart

DASH = "\u2013"


class Column(NamedTuple):
    """A column: its header, what it means, its share of the width, and a row's value as text."""

    title: str
    meaning: str
    width: float
    text: Callable[[Any], str]
    is_number: bool = True


def share(value: float | None) -> str:
    """A fraction in per cent with two decimals, so that those of a column line up."""
    return DASH if value is None else f"{value:.2%}"


def setting(value: tuple[str, float] | None) -> str:
    """What sets the sparsity, and to what: `k 32`."""
    return DASH if value is None else f"{value[0]} {value[1]:g}"


def _count(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def _word(value: str | None) -> str:
    return value or DASH


COLUMNS = {
    "variant": Column("Variant", "Kind of SAE.", 1.5, _word, False),
    "d_sae": Column("d_sae", "Number of features.", 1.1, _count),
    "sparsity": Column(
        "Sparsity", "The setting that makes it sparse: k, a target L0, or a coefficient.", 1.3, setting, False
    ),
    "hook_name": Column("Hook", "Where it reads the model.", 2.4, _word, False),
    "fvu": Column(
        "FVU", "Fraction of variance unexplained on held-out tokens; lower is better.", 1, lambda v: fixed(v, 4)
    ),
    "l0": Column("L0", "Mean number of features that fire on a token.", 0.9, lambda v: fixed(v, 1)),
    "dead_fraction": Column("Dead", "Share of features that never fired on the held-out tokens.", 1.05, share),
    "ce_loss_recovered": Column(
        "CE recovered",
        "Share of the loss added by zero ablation that the reconstruction recovers; 100 % is perfect.",
        1.2,
        share,
    ),
    "kl": Column(
        "KL", "KL divergence from the unchanged model's predictions, in nats per token.", 1, lambda v: fixed(v, 4)
    ),
    "n_tokens": Column("Tokens", "Held-out tokens that the report scored.", 1.15, _count),
}
_NAME = Column("SAE", "Its folder in the run. Choose one to read more of it below.", 2.2, _word, False)
SORTS = {"name": _NAME, **COLUMNS}
_REST = sum(column.width for column in COLUMNS.values())


def show(rows: Sequence[Summary], chosen: str) -> None:
    """The table, in the order that the URL says, with `chosen` marked."""
    sort = url.choice("sort", "name", list(SORTS))
    order = url.choice("order", "up", ["up", "down"])
    with st.container(key="sa-runs", gap=None):
        _head(sort, order)
        for i, row in enumerate(ordered(rows, sort, order == "down")):
            _row(i, row, row.name == chosen)
    if numbers := scored_apart(rows):
        st.caption(
            f"These SAEs were scored on different numbers of tokens ({', '.join(f'{n:,}' for n in numbers)}), so small "
            "differences may come from the texts: saelab eval, with the same --n-tokens for all, makes them comparable."
        )


def _head(sort: str, order: str) -> None:
    with st.container(key="sa-runs-head"):
        first, rest = _columns("bottom")
        with first:
            _header("name", sort, order)
        cells = rest.columns(
            [column.width for column in COLUMNS.values()], gap=None, wrap=False, vertical_alignment="bottom"
        )
        for cell, key in zip(cells, COLUMNS, strict=True):
            with cell:
                _header(key, sort, order)


def _header(key: str, sort: str, order: str) -> None:
    """A header, which sorts by its column, and in the other direction when it does already."""
    other = "down" if key == sort and order == "up" else "up"
    arrow = {"up": " \u2191", "down": " \u2193"}[order] if key == sort else ""
    name = f"sa-sort{'-number' if SORTS[key].is_number else ''}-{key}"
    st.button(
        SORTS[key].title.replace("_", r"\_") + arrow, key=name, help=f"{SORTS[key].meaning} Click to sort.", type="tertiary",
        width="stretch", on_click=url.go, kwargs={"sort": key, "order": other},
    )  # fmt: skip


def _row(i: int, row: Summary, is_chosen: bool) -> None:
    with st.container(key=f"sa-run-{'chosen-' if is_chosen else ''}{i}"):
        first, rest = _columns()
        first.button(
            markdown.plain(row.name), key=f"run_{row.name}", type="tertiary", on_click=url.go, kwargs={"sae": row.name},
            icon=":material/arrow_right:" if is_chosen else None, help="Show more of it below.",
        )  # fmt: skip
        rest.html(_cells(row))


def _columns(alignment: Literal["center", "bottom"] = "center") -> list[Any]:
    return list(st.columns([_NAME.width, _REST], gap=None, wrap=False, vertical_alignment=alignment))


def _cells(row: Summary) -> str:
    widths = " ".join(f"minmax(0,{column.width}fr)" for column in COLUMNS.values())
    cells = "".join(
        f"<div{' class=sa-num' if column.is_number else ''}><dt>{escape(column.title)}</dt>"
        f"<dd>{_breakable(column.text(getattr(row, key)))}</dd></div>"
        for key, column in COLUMNS.items()
    )
    return f'<dl class="sa-run" style="--widths:{widths}">{cells}</dl>'


def _breakable(text: str) -> str:
    """Text as HTML that breaks its lines behind dots and underscores, as the names of hooks have them."""
    return re.sub(r"([._])", r"\1<wbr>", escape(text))
