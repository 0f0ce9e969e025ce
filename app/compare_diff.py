"""The saved diff report of a crosscoder: which features are specific to one source, and which only look so."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from saelab.app import compare_charts, markdown
from saelab.app.compare_table import Column, show_table
from saelab.diffing import DiffReport, diff_path, load_diff
from saelab.diffing.judged import MEANING, DiffFeature
from saelab.diffing.report_html import numbers_of
from saelab.errors import SaelabError
from saelab.features import FeatureStore
from saelab.hints.next_commands import command
from saelab.runs import SaeRun

_SHOWN = 50
"""Features of a table; the report's own page has more."""


def found_report(first: SaeRun) -> DiffReport | None:
    """The saved report of the SAE, if there is one; with a warning where it cannot be read."""
    path = diff_path(first)
    if not path.exists():
        return None
    try:
        return load_diff(path)
    except SaelabError as error:
        st.warning(markdown.with_commands(str(error)), icon=":material/error:")
        return None


def show(first: SaeRun, store: FeatureStore, pair: tuple[str, str], several: bool, address: str) -> None:
    """Render this part of the page; `several`: the crosscoder has more sources than these two."""
    report = found_report(first)
    again = command("diff", first.sae_dir, *(("--a", pair[0], "--b", pair[1]) if several else ()))
    if report is None:
        _offer(
            "A small norm does not prove that a source lacks a feature. This command checks it on held-out text "
            "(Latent Scaling); then the result stands here:", again
        )  # fmt: skip
        return
    if report.about["sae"] != store.manifest["sae"]["hash"]:
        _offer("The saved diff report is of other weights than these features. This makes it again:", again)
        return
    if {report.about["a"], report.about["b"]} != set(pair):
        compared = f"{markdown.plain(report.about['a'])} and {markdown.plain(report.about['b'])}"
        _offer(f"The saved diff report compares {compared}. This makes one of the two that are chosen:", again)
        return
    for line in report.conclusions():
        st.markdown(markdown.plain(line))
    st.plotly_chart(
        compare_charts.nu_against_norm(report), key="diff", config={"displayModeBar": False},
        alt=f"nu_error against relative decoder norm; {len(report.specific)} features are specific to one source",
    )  # fmt: skip
    _tables(report, store, address)


def _offer(text: str, again: str) -> None:
    st.caption(text)
    st.code(again, language=None, wrap_lines=True)


def _tables(report: DiffReport, store: FeatureStore, address: str) -> None:
    specific = report.specific
    if specific:
        _table(specific, store, address, f"{len(specific):,} specific features")
    else:
        st.info("No feature that looks specific survives Latent Scaling.", icon=":material/filter_alt_off:")
    rest = [one for one in report.features if one not in specific]
    if rest:
        told = "look specific by their decoder norms, but are artefacts or cannot be judged"
        with st.expander(f"{len(rest):,} {told}"):
            _table(rest, store, address, f"{len(rest):,} that {told}", dim=True)
            st.caption(" ".join(f"{markdown.plain(name)}: {markdown.plain(text)}." for name, text in MEANING.items()))


def _table(rows: Sequence[DiffFeature], store: FeatureStore, address: str, caption: str, dim: bool = False) -> None:
    rows = rows[:_SHOWN]
    if len(rows) == _SHOWN:
        caption += f", the first {_SHOWN}"
    numbers = [numbers_of(one) for one in rows]
    changed = [_change(one) for one in rows]
    show_table(
        [
            Column("Feature", features=[one.feature for one in rows], store=store, address=address),
            Column("Verdict", [f"{one.side} only: {one.said}" for one in rows]),
            *([Column("The change", changed)] if any(changed) else []),
            Column("Fires on", [one[1] for one in numbers]),
            Column("nu_error", [one[2] for one in numbers]),
            Column("nu_reconstruction", [one[3] for one in numbers]),
        ],
        caption,
        dim=dim,
    )


def _change(one: DiffFeature) -> str:
    if one.related is None:
        return ""
    return f"{'related' if one.related.related else 'not related'} ({one.related.difference})"
