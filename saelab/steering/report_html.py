"""A steering report as HTML: one card without scripts, light and dark, every token escaped."""

from __future__ import annotations

from pathlib import Path

from saelab.features.visible import escape, visible
from saelab.files import atomic_write_text
from saelab.steering.effect_plot import Point, effect_plot
from saelab.steering.reported import Reported, ReportRow, cell, columns

_STYLE = """
.sr{max-width:72rem;padding:1rem 1.2rem;border:1px solid rgba(128,128,128,.35);border-radius:8px;line-height:1.5;
font-family:system-ui,sans-serif;background:#fff;color:#1f2328;font-variant-numeric:tabular-nums}
@media (prefers-color-scheme:dark){.sr{background:#16181d;color:#e8eaed}}
.sr h3{margin:0;font-size:1.1rem}.sr p{margin:.3rem 0 .7rem}
.sr-note{font-size:.8rem;opacity:.8}.sr-wide{overflow-x:auto}
.sr table{border-collapse:collapse;font-size:.82rem}.sr th{font-weight:600;font-size:.76rem;opacity:.8}
.sr :is(th,td){text-align:right;padding:.15rem .6rem;white-space:nowrap}
.sr :is(th,td):first-child{text-align:left;padding-left:0}.sr td{border-top:1px solid rgba(128,128,128,.25)}
.sr td b{font-weight:600}.sr td span{opacity:.7;font-size:.92em}
.sr dt{font-weight:600;font-size:.85rem;margin-top:.5rem}.sr dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap}
"""
_LONGEST = 2_000
"""Characters of a text that are shown."""


def report_card(report: Reported) -> str:
    """The card with its style, for a notebook or a file."""
    title = escape(f"Steering with feature {report.feature}") + (
        f" <bdi>{escape(report.label)}</bdi>" if report.label else ""
    )
    texts = "".join(
        f"<dt>{escape(way)}</dt><dd><bdi>{escape(text[:_LONGEST])}</bdi></dd>" for way, text in report.examples()
    )
    return (
        f'<style>{_STYLE}</style><div class="sr"><h3>{title}</h3><p>{escape(report.verdict())}</p>{_plot(report)}'
        f'<div class="sr-wide">{_table(report)}</div><p class="sr-note">{_legend(report)}</p>'
        f"<p><bdi>{escape(report.prompts[0][:_LONGEST])}</bdi> \u2026</p><dl>{texts}</dl></div>"
    )


def save_report(report: Reported, path: str | Path) -> Path:
    """Write the card as an HTML file that stands on its own; returns its path."""
    title = escape(visible(f"Feature {report.feature} {report.label}"[:60]) + " \u00b7 saelab")
    atomic_write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        'content="default-src \'none\'; style-src \'unsafe-inline\'"><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title></head>'
        f"<body>{report_card(report)}</body></html>",
    )
    return Path(path)


def _plot(report: Reported) -> str:
    series = {way: [_point(row) for row in report.of(way)] for way in report.ways}
    return effect_plot(series, "cost (nats per token under the unsteered model)", "read back")


def _point(row: ReportRow) -> Point:
    name = "" if row.strength is None else f"{row.strength:g}"
    return Point(row.nll_cost.mean, *row.read_back, name=name)


def _table(report: Reported) -> str:
    shown, best = columns(report), report.best
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("way", "p99", *(name for name, _ in shown)))
    rows = []
    for row in report.rows:
        way = f"<b>{escape(row.way)}</b>" if row is best else escape(row.way)
        cells = "".join(f"<td>{_cell(of(row))}</td>" for _, of in shown)
        rows.append(f"<tr><td>{way}</td><td>{'' if row.strength is None else f'{row.strength:g}'}</td>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _cell(value: object) -> str:
    mean, _, interval = cell(value).partition(" ")  # pyright: ignore[reportArgumentType]
    return f"{mean} <span>{interval}</span>" if interval else mean


def _legend(report: Reported) -> str:
    n = len(report.prompts) * len(report.seeds)
    said = (
        f"{n} texts a row ({len(report.prompts)} prompts, {len(report.seeds)} seeds) by {escape(report.model)}; changes from "
        "the unsteered text of the same prompt and seed, with 95 % bootstrap intervals over prompts and seeds. Read back: share "
        "of the tokens on which the unsteered model and SAE, reading the text, find the feature above a quarter of its p99. "
        "Cost: how much less likely the text is under the unsteered model. Score: read back times fluency. Controls push as "
        "hard as the feature. "
    )
    if report.n_neutral:
        said += (
            f"Neutral text, KL and the rise of tokens: along {report.n_neutral} neutral texts, which stay as they are. "
        )
    if report.ask:
        said += f"The prompt that asks begins with <bdi>{escape(repr(report.ask[:200]))}</bdi>. "
    if report.probe is not None:
        share, n_test = f"{report.probe.accuracy:.0%}", report.probe.n_test
        said += f"Concept: its probability by a probe that is right on {share} of {n_test} texts held out. "
    return said
