"""A diff report as HTML: one card without scripts, light and dark, every token escaped; and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saelab.diffing.judged import DEAD, MEANING, RARE, SPECIFIC, DiffFeature, Judged
from saelab.diffing.plot import legend, plot
from saelab.features.visible import chip_text, escape, visible
from saelab.files import atomic_write_text

_STYLE = """
.df{max-width:72rem;padding:1rem 1.2rem;border:1px solid rgba(128,128,128,.35);border-radius:8px;line-height:1.5;
font-family:system-ui,sans-serif;background:#fff;color:#1f2328;font-variant-numeric:tabular-nums}
@media (prefers-color-scheme:dark){.df{background:#16181d;color:#e8eaed}}
.df h3{margin:0;font-size:1.1rem;overflow-wrap:anywhere}.df h4{margin:1rem 0 .2rem;font-size:.95rem}.df p{margin:.3rem 0 .7rem}
.df-note{font-size:.8rem;opacity:.8}.df-wide{overflow-x:auto}
.df table{border-collapse:collapse;font-size:.82rem}.df th{font-weight:600;font-size:.76rem;opacity:.8}
.df :is(th,td){text-align:left;padding:.15rem .6rem;border-top:1px solid rgba(128,128,128,.25);vertical-align:top}
.df :is(th,td).n{text-align:right;white-space:nowrap}.df .grey td{opacity:.6}
.df code{font-size:.9em;background:rgba(128,128,128,.15);border-radius:3px;padding:0 .25em;margin-right:.2em}
"""
_MOST_ROWS = 200
"""Features that a table lists; the JSON has all."""
_NUMBERS = ("Relative norm", "Fires on", "nu_error", "nu_reconstruction")


def card(report: Judged) -> str:
    """The card with its style, for a notebook or a file."""
    about = report.about
    title = f"What differs between <bdi>{escape(about['a'])}</bdi> (a) and <bdi>{escape(about['b'])}</bdi> (b)"
    said = "".join(f"<p>{escape(visible(line))}</p>" for line in report.conclusions())
    rest = [one for one in report.features if one.verdict != SPECIFIC]
    blocks = [
        ("Specific", report.specific, ""),
        ("Look specific by their decoder norms, but are artefacts or cannot be judged", rest, "grey"),
    ]
    tables = "".join(
        f'<h4>{escape(name)}: {len(rows)}</h4><div class="df-wide">{table(rows, kind, "", about["changed"] is not None)}</div>'
        for name, rows, kind in blocks
        if rows
    )
    return (
        f'<style>{_STYLE}</style><div class="df"><h3>{title}</h3>{said}{plot(report)}<p class="df-note">{legend(report)}</p>'
        f'{tables}<p class="df-note">{escape(notes(report))}</p></div>'
    )


def save_html(report: Judged, path: str | Path) -> Path:
    """Write the card as an HTML file that stands on its own; returns its path."""
    title = escape(visible(f"{report.about['a']} and {report.about['b']}"[:80]))
    atomic_write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        'content="default-src \'none\'; style-src \'unsafe-inline\'"><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width"><title>{title} \u00b7 saelab</title></head>'
        f"<body>{card(report)}</body></html>\n",
    )
    return Path(path)


def table(rows: Sequence[DiffFeature], kind: str, address: str = "", related: bool = False) -> str:
    """Features as an HTML table; with `address`, the start of a link that the feature's number completes."""
    names = [
        "Feature",
        "Verdict",
        *(["Documents with the change"] if related else []),
        *_NUMBERS,
        "Tokens at its peaks",
    ]
    head = "".join(f'<th scope="col"{_align(name)}>{escape(name)}</th>' for name in names)
    lines = "".join(_line(one, address, related) for one in rows[:_MOST_ROWS])
    more = f"<p>And {len(rows) - _MOST_ROWS:,} more, in the JSON.</p>" if len(rows) > _MOST_ROWS else ""
    return f'<table class="{escape(kind)}"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>{more}'


def _line(one: DiffFeature, address: str, related: bool) -> str:
    number = (
        f'<a href="{escape(address)}{one.feature}" target="_self">{one.feature}</a>' if address else str(one.feature)
    )
    tokens = " ".join(f"<code><bdi>{chip_text(token)}</bdi></code>" for token in one.tokens)
    cells = [
        f"<td>{number} <bdi>{escape(one.label or '')}</bdi></td>",
        f"<td>{one.side} only: {escape(one.said)}</td>",
        *([f"<td>{escape(_related(one))}</td>"] if related else []),
        *(f'<td class="n">{escape(text)}</td>' for text in numbers_of(one)),
        f"<td>{tokens}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def numbers_of(one: DiffFeature) -> tuple[str, str, str, str]:
    """Relative norm, density, nu_error and nu_reconstruction, for a reader."""
    fires = f"{one.density.percent} ({one.n_fired:,})"
    return f"{one.delta:.2f}", fires, str(one.nu_error), str(one.nu_reconstruction)


def _related(one: DiffFeature) -> str:
    if one.related is None:
        return ""
    share = f"{one.related.difference}"
    return ("more of them" if one.related.related else "not related") + f" ({share}, q {one.related.q:.2g})"


def _align(name: str) -> str:
    return ' class="n"' if name in _NUMBERS else ""


def notes(report: Judged) -> str:
    """How all was measured."""
    about = report.about
    most = about["thresholds"]
    counts = ", ".join(f"{n:,} {name}" for name, n in about["counts"].items())
    return (
        f"Decoder norms of all {about['d_sae']:,} features: {counts}. Read: {about['n_tokens']:,} tokens of {about['texts']} "
        f"({about['split'].replace('_', '-')}); {about['n_dead']:,} features fire on none of them, {about['n_rare']:,} on fewer "
        f"than {most['min_tokens']} tokens or in fewer than {most['min_blocks']} of {about['n_blocks']} blocks of contexts. "
        "Latent Scaling and its thresholds are those of Minder et al. 2025 (arXiv 2504.02922): specific features have |nu_error| "
        f"below {most['nu_error']} and |nu_reconstruction| below {most['nu_reconstruction']}, in units in which both sources "
        "have the same variance. Intervals (95 %) are of resampled blocks; \u201cnot for sure\u201d: an interval reaches across "
        "a threshold. " + " ".join(f"{name}: {text}." for name, text in MEANING.items())
    )


def told(report: Judged, limit: int = 20) -> list[Any]:
    """The conclusions, and the first features as a rich table, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    shown = [one for one in report.features if one.verdict not in (RARE, DEAD)][:limit]
    said: list[Any] = [*report.conclusions()]
    if not shown:
        return said
    found = Table(title="Features that look specific by their decoder norms")
    for name in ("feature", "verdict", *_NUMBERS, *(["change"] if report.about["changed"] else []), "label"):
        found.add_column(name, justify="right" if name in _NUMBERS else "left")
    for one in shown:
        change = [_related(one)] if report.about["changed"] else []
        cells = (str(one.feature), f"{one.side} only: {one.said}", *numbers_of(one), *change, visible(one.label or ""))
        found.add_row(*(Text(cell) for cell in cells))
    return [*said, found]
