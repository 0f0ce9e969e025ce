"""The URL of the dashboard, the single source of truth for the view: parameters read from it, and widgets bound to them.

A widget takes its value from the URL and writes it back. Text from the URL is looked up or parsed, never joined to a path; what
is not understood is named in a notice and removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import streamlit as st

from saelab.app import markdown

PARAMETERS = frozenset({
    "sae", "feature", "q", "sort", "order", "show", "list", "page", "kind", "by", "fired", "text",
    "strength", "end", "prompt", "tokens", "temperature", "seed", "do", "edits", "on", "strengths", "seeds", "control", "chat",
    "doc", "curve", "curves", "job", "a", "b",
    "colour", "near", "lasso", "view", "with", "same", "left", "right", "side",
})  # fmt: skip
"""Every URL parameter of every page; others get a notice."""
PER_PAGE = 25
"""Rows of a table on one page."""
MAX_ADDRESS = 1500
"""Characters of text that an address holds: browsers and proxies cut longer ones."""
_ORDERING = ("q", "list", "sort", "order", "show", "fired", "with", "same", "view", "side", "left", "right", "near")
"""Parameters that change what is on which page of a table."""


def integer(name: str, default: int, low: int, high: int) -> int:
    """An integer from the URL; anything else, or a value outside `low` to `high`, shows a notice and returns `default`."""
    text = st.query_params.get(name)
    if text is None:
        return default
    try:
        value = int(text) if len(text) < 20 else high + 1
    except ValueError:
        value = high + 1
    if low <= value <= high:
        return value
    notice(name, text, f"a number from {low} to {high}", default)
    return default


def real(name: str, default: float, low: float, high: float) -> float:
    """As `integer`, for a float."""
    text = st.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if low <= value <= high:
        return value
    notice(name, text, f"a number from {low:g} to {high:g}", default)
    return default


def choice(name: str, default: str, options: Sequence[str]) -> str:
    """One of `options` from the URL, with the same fallback."""
    text = st.query_params.get(name)
    if text is None or text in options:
        return text or default
    notice(name, text, "one of " + ", ".join(option for option in options if option), default)
    return default


def parsed(name: str, default: Any, parse: Callable[[str], Any], expected: str) -> Any:
    """What `parse` reads in a URL parameter; where it raises `ValueError`, a notice and `default`."""
    text = st.query_params.get(name)
    if text is None:
        return default
    try:
        return parse(text)
    except ValueError:
        return refused(name, text, expected, default)


def refused(name: str, text: str, expected: str, default: Any) -> Any:
    """Say that a URL parameter is not as expected, and remove it; returns `default`."""
    notice(name, text, expected, "")
    return default


def notice(name: str, text: str, expected: str, default: Any) -> None:
    """Say that the URL parameter `name` is not what was expected and what is shown instead, and remove it."""
    instead = f" Showing {markdown.plain(str(default))}." if default != "" else ""
    _say(f"The URL has {name} = {markdown.plain(repr(text[:40]))}; expected {markdown.plain(expected)}.{instead}")
    del st.query_params[name]


def check_parameters() -> None:
    """Say which parameters of the URL no page knows, in one notice, and remove them."""
    if unknown := sorted(set(st.query_params) - PARAMETERS):
        names = ", ".join(repr(name[:40]) for name in unknown[:5])
        _say(f"The URL has parameters that the dashboard does not know: {markdown.plain(names)}.")
        for name in unknown:
            del st.query_params[name]


def show_notices() -> None:
    """The place of all notices about the URL: above the page."""
    st.session_state["notices"] = st.container()


def _say(text: str) -> None:
    st.session_state["notices"].warning(text, icon=":material/link_off:")


def bound(name: str, value: Any) -> dict[str, Any]:
    """Arguments that bind a widget to the URL parameter `name`: it shows `value` and writes changes back to the URL."""
    key = f"box_{name}"
    st.session_state[key] = value
    return {"key": key, "on_change": _write_url, "args": (name, key)}


def text_box_key(name: str, default: str, most: int) -> str:
    """The key of a text box in a form, whose text is that of the URL parameter `name` whenever that has changed, else what was
    typed last. (A box whose value followed the URL without a key would be another box after each submission, and lose the next
    text.)"""
    key, url, session = f"text_{name}", st.query_params.get(name), st.session_state
    if key not in session or (url is not None and url != session.get(f"seen_{name}")):
        session[key] = (session.get(f"typed_{name}", default) if url is None else url)[:most]
    session[f"seen_{name}"] = url
    return key


def keep_texts(texts: dict[str, str]) -> None:
    """Write submitted texts to the URL, by the names of their parameters, if it holds them (`fits_address`)."""
    fits = fits_address(texts)
    for name, text in texts.items():
        st.session_state[f"typed_{name}"] = text
        st.session_state[f"seen_{name}"] = text if fits else None
        if fits:
            st.query_params[name] = text
        else:
            st.query_params.pop(name, None)


def fits_address(texts: dict[str, str]) -> bool:
    """Whether texts are short enough, together, to be restored from the address."""
    return sum(map(len, texts.values())) <= MAX_ADDRESS


@contextmanager
def page_of(count: int) -> Iterator[slice]:
    """Which of `count` rows are on the page that the URL names; below them page numbers bound to it, if there are several."""
    pages = -(-count // PER_PAGE)
    page = integer("page", 1, 1, pages)
    yield slice((page - 1) * PER_PAGE, page * PER_PAGE)
    if pages > 1:
        key = f"box_page_{page}"  # st.pagination takes no value from session state without a warning
        st.pagination(pages, default=page, key=key, on_change=_write_url, args=("page", key))


def go_button(label: str, icon: str, shortcut: str | None = None, *, disabled: bool = False, **query: Any) -> None:
    """Show a button that changes this page's URL parameters. (A link to the page one is on would leave the address as it is.)"""
    st.button(label, key=f"go_{label}", icon=icon, shortcut=shortcut, disabled=disabled, on_click=go, kwargs=query)


def go(**query: Any) -> None:
    """Change this page's URL parameters; for a button's `on_click`."""
    st.query_params.pop("doc", None)  # as in _write_url
    for name, value in query.items():
        st.query_params[name] = str(value)


def _write_url(name: str, key: str) -> None:
    value = st.session_state[key]
    st.query_params[name] = str(value)
    if name in ("feature", "kind"):
        st.query_params.pop("doc", None)  # the open document is that of an example in the view which is left
    if value in (None, "") and name in ("q", "near"):
        del st.query_params[name]
    if name == "near":  # one choice at a time
        st.query_params.pop("lasso", None)
    if name in _ORDERING:
        st.query_params.pop("page", None)  # page numbers are meaningless in another order
