"""Texts page: two sets of texts, and which features fire in more texts of one than of the other."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import streamlit as st

from saelab.app import as_python, markdown, state, url
from saelab.features import FeatureStore
from saelab.features.collected_with import model_names
from saelab.features.contrast import MIN_TEXTS, lines
from saelab.features.visible import escape

MAX_CHARACTERS, MAX_TEXTS = 20_000, 200
"""Of each set: a pass of some seconds. More texts are compared in Python or by `saelab features RUN --contrast FILE FILE`."""
_ROWS = 25
_BOXES = {"a": "First texts", "b": "Second texts"}
_EXAMPLE = {
    "a": "The rain kept falling all day.\nA cold wind blew in from the sea.\nThe storm broke over the harbour.",
    "b": "She signed the contract on Monday.\nThe bank raised its interest rates.\nProfits fell in the last quarter.",
}


def show() -> None:
    """Render the page."""
    store = state.store()
    st.title("Texts")
    state.show_purpose(store, "Which features tell two sets of texts apart.")
    texts, pressed = _boxes()
    if pressed:
        st.session_state.pop("contrast", None)
        url.keep_texts(texts)
        with state.friendly_errors():
            st.session_state["contrast"] = (store.folder, texts, _read(store, texts))
    folder, read, found = st.session_state.get("contrast", (None, None, None))
    if found is None or folder != store.folder:
        return
    if read != texts:
        st.info("The texts have changed since they were compared: press Compare.", icon=":material/update:")
        return
    if not url.fits_address(texts):
        st.caption(f"Texts of over {url.MAX_ADDRESS:,} characters are not in the address, which does not restore them.")
    _result(found)
    as_python.offer(*_python(texts), store=store, models=model_names(store))


def _boxes() -> tuple[dict[str, str], bool]:
    """What stands in the two boxes, and whether the button was pressed."""
    texts = {}
    with st.form("texts", border=False):
        for column, (name, label) in zip(st.columns(2), _BOXES.items(), strict=True):
            texts[name] = column.text_area(
                f"{label}, one in each line", max_chars=MAX_CHARACTERS, height=220,
                help=f"At most {MAX_TEXTS} texts; at least {MIN_TEXTS} in each box for a claim.",
                key=url.text_box_key(name, _EXAMPLE[name], MAX_CHARACTERS),
            )  # fmt: skip
        pressed = st.form_submit_button("Compare", type="primary", icon=":material/compare_arrows:")
    return texts, pressed


def _read(store: FeatureStore, texts: dict[str, str]) -> Any:
    """Read both sets. Raises `ValueError` naming what is wrong with them."""
    sets = {name: lines(text) for name, text in texts.items()}
    for name, found in sets.items():
        if not found:
            raise ValueError(f"{_BOXES[name]} are empty: write one text in each line.")
        if len(found) > MAX_TEXTS or len(texts[name]) > MAX_CHARACTERS:
            raise ValueError(
                f"{_BOXES[name]} have {len(found):,} lines and {len(texts[name]):,} characters; at most {MAX_TEXTS} and "
                f"{MAX_CHARACTERS:,} are read here. More: saelab features RUN --contrast FILE FILE."
            )
    bar, place = st.progress(0.0, "Waiting for the model ..."), st.empty()
    place.button("Cancel", icon=":material/close:", key="cancel_texts")  # a click ends this run at its next message
    try:
        from saelab.features.text_sets import contrast_texts

        with state.MODEL_LOCK:
            lm = state.load_models(store)
            return contrast_texts(
                store, lm, sets["a"], sets["b"], progress=lambda done, n: bar.progress(done / n, f"{done} of {n} texts")
            )
    finally:
        bar.empty()
        place.empty()


def _result(found: Any) -> None:
    """The sentence and both tables."""
    notice, icon = (st.success, ":material/check:") if found.found.any() else (st.info, ":material/info:")
    notice(markdown.plain(found.summary), icon=icon)
    st.caption(
        "Sorted by the difference of the shares of texts in which the feature fires. In brackets its 95 % interval (Newcombe), "
        "of one feature looked at alone; q: the false discovery rate (Benjamini and Hochberg) over all features that fired, of "
        "Fisher's exact test; \u2713: q at most 0.05. Mean: the mean activation over a text's tokens."
    )
    for side, label in _BOXES.items():
        st.subheader(f"Fire in more of the {label.lower()}")
        rows = found.rows(_ROWS, side)
        st.html(_table(rows, found.enough) if rows else '<p class="sa-sub">None.</p>')


def _table(rows: list[dict[str, Any]], enough: bool) -> str:
    heads = {"Feature": "", "First": "", "Second": "", "Difference": "", "Mean": "sa-wide", "q": ""}
    head = "".join(f'<th class="{classes}">{name}</th>' for name, classes in heads.items())
    return f'<table class="sa-table"><tr>{head}</tr>{"".join(_line(row, enough) for row in rows)}</table>'


def _line(row: dict[str, Any], enough: bool) -> str:
    address = escape("feature?" + urlencode({"feature": row["feature"], **state.sae_parameter()}))
    label = escape((row["label"] or "\u2013")[:80])
    found = " \u2713" if row["found"] else ""
    q = f"{row['q']:.2g}" if enough else "\u2013"
    return (
        f'<tr><td><a href="{address}" target="_self">{row["feature"]}</a> <bdi>{label}</bdi></td>'
        f"<td>{row['share_a']:.0%}</td><td>{row['share_b']:.0%}</td>"
        f'<td>{row["difference"]:+.2f} <small class="sa-wide">[{row["low"]:+.2f}, {row["high"]:+.2f}]</small></td>'
        f'<td class="sa-wide">{row["mean_a"]:.2f} : {row["mean_b"]:.2f}</td><td>{q}{found}</td></tr>'
    )


def _python(texts: dict[str, str]) -> list[str]:
    sets = [f"{name} = [" + "".join(f"\n    {line!r}," for line in lines(text)) + "\n]" for name, text in texts.items()]
    return [
        *sets,
        "found = store.contrast(lm, a, b)",
        "print(found.summary)",
        f"rows = found.rows({_ROWS}, 'a')  # or 'b'",
    ]
