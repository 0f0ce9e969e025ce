"""A probing report as tables for a terminal, and as files: `report.json`, and an HTML page with the quiver."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from saelab.features.visible import escape, visible
from saelab.files import atomic_write_json, atomic_write_text
from saelab.probing.quiver import quiver
from saelab.probing.report import MethodRow, ProbeReport, counted, shown, title

_STYLE = """
body{margin:1.5rem auto;max-width:62rem;padding:0 1rem;font-family:system-ui,sans-serif;line-height:1.5;background:#fff;
color:#1f2328;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;font-size:.85rem}th{font-weight:600;font-size:.78rem;opacity:.8}
:is(th,td){text-align:right;padding:.15rem .7rem;border-top:1px solid rgba(128,128,128,.25)}
:is(th,td):first-child{text-align:left;padding-left:0}.left :is(th,td){text-align:left;overflow-wrap:anywhere}
@media (prefers-color-scheme:dark){body{background:#16181d;color:#e8eaed}}
"""
_COLUMNS = ("probe", "AUC", "balanced accuracy", "AUC minus activations'", "noise of splits")


def told(report: ProbeReport) -> list[Any]:
    """The methods in the standard regime, their AUC in the others, and what follows: rich tables and text."""
    standard, *hard = report.regimes
    tables = [_table(_heading(report, standard), _COLUMNS, [_cells(row) for row in report.rows(standard)])]
    if hard:
        columns = [[f"{row.auc.mean:.3f}" for row in report.rows(regime)] for regime in hard]
        rows = [(title(name), *cells) for name, *cells in zip(report.methods, *columns, strict=True)]
        tables.append(_table(f"AUC on {_heading(report, hard[0]).partition(': ')[2]}", ("probe", *hard), rows))
    return [*tables, *conclusions(report)]


def _table(name: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title=name)
    for column in columns:
        table.add_column(column, justify="left" if column == "probe" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def conclusions(report: ProbeReport) -> list[str]:
    """The verdict on each regime, and how large a difference between two SAEs has to be."""
    believed = report.believed(report.regimes[0])
    return [report.verdict(regime) for regime in report.regimes] + ([believed] if believed else [])


def save(report: ProbeReport, path: str | Path) -> list[Path]:
    """Write `path`, the JSON, and the page beside it; returns both."""
    path = Path(path)
    page = path.with_suffix(".html")
    atomic_write_text(page, report_html(report))
    atomic_write_json(path, report.data())
    return [path, page]


def report_html(report: ProbeReport) -> str:
    """The page, which stands on its own."""
    blocks = "".join(_block(report, regime) for regime in report.regimes)
    said = "".join(f"<p>{escape(visible(line))}</p>" for line in conclusions(report))
    best = {name: of[0].feature for name, of in report.of(report.regimes[0]).items()}
    sets = _html_table(
        ("set", "yes stands for", "texts", "best feature", "origin"),
        [(one.name, one.positive, f"{one.n_texts:,}", str(best[one.name]), one.origin) for one in report.sets],
        "left",
    )
    about = f"SAE {report.about['sae'][:10]} on {', '.join(report.about['hooks'])} of {report.about['model']}"
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width"><title>Probing \u00b7 saelab</title>'
        f"<style>{_STYLE}</style></head><body><h1>Probing</h1><p>{escape(visible(about))}</p>{said}{blocks}"
        f"<h2>Sets</h2>{sets}</body></html>\n"
    )


def _block(report: ProbeReport, regime: str) -> str:
    table = _html_table(_COLUMNS, [_cells(row) for row in report.rows(regime)])
    return f"<h2>{escape(_heading(report, regime))}</h2>{table}{quiver(report.arrows(regime))}"


def _heading(report: ProbeReport, regime: str) -> str:
    n = counted(len(report.of(regime)), "set")
    return f"{regime}: {n}, {counted(report.config.n_splits, 'split')} of each"


def _cells(row: MethodRow) -> tuple[str, ...]:
    gain = "" if row.method == "raw" else shown(row.gain)
    noise = "" if row.noise is None else f"{row.noise:.4f}"
    return title(row.method), f"{row.auc.mean:.4f}", f"{row.accuracy:.4f}", gain, noise


def _html_table(head: tuple[str, ...], rows: list[tuple[str, ...]], kind: str = "") -> str:
    lines = "".join(f"<tr>{''.join(f'<td>{escape(visible(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="{kind}"><tr>{"".join(f"<th>{escape(name)}</th>" for name in head)}</tr>{lines}</table>'
