"""A comparison as HTML: one card without scripts, light and dark, under 200 kB, every token escaped.

Below each text a strip has one bar for each token: the higher, the less likely the token under the unsteered model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from statistics import fmean
from typing import Any

from saelab.features.numbers import signed
from saelab.features.token_text import Group, display_groups
from saelab.features.visible import escape
from saelab.steering.compared import Compared, Continuation
from saelab.steering.effect_plot import Point, effect_plot
from saelab.steering.plan import is_as_asked
from saelab.steering.read_features import FIRES_ABOVE

MAX_BYTES = 200_000
_FRAME = 4_000  # bytes of style, head and the note on what is left out
_MAX_PROMPT = 1_000  # characters of a prompt that are shown
_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
COST, EFFECT = "cost (nats per token)", "read back over unsteered"
NATS_PER_BAR = 1.25
"""A strip's lowest bar is up to this many nats, the highest over seven times as many."""

STYLE = """
.sc{line-height:1.5;font-variant-numeric:tabular-nums}.sc h4{margin:1rem 0 .2rem;font-size:.9rem}
.sc-note{font-size:.8rem;opacity:.8;margin:.2rem 0 .6rem}
.sc-sum{border-collapse:collapse;font-size:.88rem}.sc-sum th{font-weight:600;font-size:.76rem;opacity:.8}
.sc-sum :is(th,td){text-align:right;padding:.15rem .7rem}.sc-sum :is(th,td):first-child{text-align:left;padding-left:0}
.sc-sum td{border-top:1px solid rgba(128,128,128,.25)}
.sc-row{display:grid;grid-template-columns:9rem minmax(0,1fr);gap:.2rem 1rem;padding:.5rem 0;
border-top:1px solid rgba(128,128,128,.25)}
.sc-n b{display:block}.sc-n span{display:block;font-size:.78rem;opacity:.85}
.sc-text{overflow-wrap:anywhere;white-space:pre-wrap}
.sc-text i{font-style:normal;opacity:.62}
.sc mark{background:rgba(230,159,0,.45);color:inherit;border-radius:3px;text-decoration:underline;text-underline-offset:3px}
.sc-bars{overflow-wrap:anywhere;font:.72rem/1.1 monospace;opacity:.85;margin-top:.2rem}
@media (max-width:600px){.sc-row{grid-template-columns:minmax(0,1fr)}}
"""
_CARD = """
.sc-card{max-width:64rem;padding:1rem 1.2rem;border:1px solid rgba(128,128,128,.35);border-radius:8px;
font-family:system-ui,sans-serif;background:#fff;color:#1f2328}
@media (prefers-color-scheme:dark){.sc-card{background:#16181d;color:#e8eaed}}
.sc-card h3{margin:0;font-size:1.1rem}
"""


def compare_card(compared: Compared) -> str:
    """The card with its style, for a notebook or a file."""
    title = escape(", ".join(_name(edit) for edit in compared.plan.edits))
    body = comparison_html(compared)
    return f'<style>{STYLE}{_CARD}</style><div class="sc-card"><h3><bdi>{title}</bdi></h3>{body}</div>'


def comparison_html(compared: Compared, with_plot: bool = True) -> str:
    """Numbers and texts, without style; texts that would exceed the size are left out, and counted."""
    plot = _plot(compared) if with_plot else ""
    shown, left = [_summary(compared), plot, _legend(compared)], MAX_BYTES - _FRAME
    left -= sum(len(one.encode()) for one in shown) + len(STYLE) + len(_CARD)
    for (prompt, seed), texts in groupby(_by_seed(compared), lambda one: (one.prompt, one.seed)):
        pieces = [_head(compared, prompt, seed), *(_row(compared, one) for one in texts)]
        for piece in pieces:
            left -= len(piece.encode())
            if left < 0:
                break
            shown.append(piece)
        if left < 0:
            n = len(compared.texts)
            shown.append(f'<p class="sc-note">Not all of the {n} texts fit; those left out are in .texts.</p>')
            break
    return f'<div class="sc">{"".join(shown)}</div>'


def drafts_html(texts: Sequence[Continuation], prompt: str, read: Sequence[Continuation] = ()) -> str:
    """Texts that are not finished, with the numbers of those that were `read` last, which may be shorter."""
    told, rows = _numbers_of(read), []
    for one in sorted(texts, key=lambda one: one.seed):
        text = _text(display_groups(one.pieces))
        numbers = "".join(f"<span>{said}</span>" for said in told.get((one.arm, one.seed), ()))
        names = f"<b>{arm_name(one)}</b><span>seed {one.seed}</span>{numbers}"
        rows.append(_grid(names, f'<div class="sc-text"><bdi>{text}</bdi></div>'))
    return (
        f'<div class="sc"><p class="sc-note"><bdi>{escape(prompt[:_MAX_PROMPT])}</bdi> \u2026</p>{"".join(rows)}</div>'
    )


def _numbers_of(read: Sequence[Continuation]) -> dict[Any, list[str]]:
    """Read-back and cost by arm and seed, of texts of one prompt."""
    base = {one.seed: one for one in read if one.strength is None}
    found = {}
    for one in read:
        fires = [fmean(value > FIRES_ABOVE for value in values) for values in one.values]
        said = [f"read back {fmean(fires):.2f}"] if fires else []
        found[one.arm, one.seed] = said + (
            [] if one.strength is None else [f"cost {signed(one.nll - base[one.seed].nll, 2)}"]
        )
    return found


def arm_name(continuation: Continuation) -> str:
    """How a text is named: by what steered it."""
    if continuation.strength is None:
        return "unsteered"
    return f"{'random ' if continuation.control else ''}\u00d7 {continuation.strength:g}".replace("-", "\u2212")


def strip(log_probs: Sequence[float]) -> str:
    """One bar for each token."""
    return "".join(_BARS[min(len(_BARS) - 1, int(-one / NATS_PER_BAR))] for one in log_probs)


def kept_tokens(compared: Compared, continuation: Continuation) -> list[bool]:
    """Of each token, whether the unsteered text has it too, by the longest common runs."""
    base = compared.unsteered(continuation)
    kept = [base is continuation] * len(continuation.ids)
    if base is not continuation:
        for block in SequenceMatcher(None, base.ids, continuation.ids, autojunk=False).get_matching_blocks():
            kept[block.b : block.b + block.size] = [True] * block.size
    return kept


def _name(edit: Any) -> str:
    asked = edit.asked if getattr(edit, "asked", {}) and is_as_asked(edit) else {}
    if "unit" in asked and isinstance(asked.get("value"), int | float):
        where = ", where it fires" if asked.get("where") == "fires" else ""
        return (
            f"{asked['do']} {asked['value']:g} {asked['unit']} of feature {asked['feature']} at {edit.hook_name}{where}"
        )
    return repr(edit).strip("<>")[:120]


def _by_seed(compared: Compared) -> list[Continuation]:
    return sorted(compared.texts, key=lambda one: (one.prompt, one.seed))  # stable: arms keep their order


def _summary(compared: Compared) -> str:
    names = ("strength", "read back", "over unsteered", "cost (nats per token)", "repeated")
    rows = []
    for row in compared.summary:
        arm = (
            "unsteered"
            if row["strength"] is None
            else f"{'random ' if row['control'] else ''}\u00d7 {row['strength']:g}"
        )
        cells = (arm, _share(row["read_back"]), signed(row["read_back_rise"], 2), signed(row["nll_cost"], 2))
        rows.append("".join(f"<td>{cell}</td>" for cell in (*cells, _share(row["repeated"]))))
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f'<table class="sc-sum"><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'


def effect_against_cost(compared: Compared) -> dict[str, list[Point]]:
    """Each strength as a point, of what is steered and of the control; {} where fewer than two were read back."""
    series: dict[str, list[Point]] = {}
    for row in compared.summary:
        if row["read_back"] is not None and row["strength"] is not None:
            effect, name = row["read_back_rise"], f"\u00d7 {row['strength']:g}".replace("-", "\u2212")
            point = Point(row["nll_cost"], effect, effect, effect, name)
            series.setdefault("random direction" if row["control"] else "steered", []).append(point)
    return series if max(map(len, series.values()), default=0) > 1 else {}


def _plot(compared: Compared) -> str:
    series = effect_against_cost(compared)
    return effect_plot(series, COST, EFFECT) if series else ""


def _legend(compared: Compared) -> str:
    told = [f"{one.feature} {one.label[:60]}".strip() for one in compared.features]
    read = (
        f"Marked: tokens on which the unsteered model and SAE read feature {escape(', '.join(told))}; read back is their share. "
        if told
        else ""
    )
    return (
        f'<p class="sc-note">{read}Cost: how much less likely the text is under the unsteered model than its own. Dimmed: '
        "tokens that the unsteered text has too. Bars: the higher, the less likely the token. Same random numbers on every "
        f"line of a seed; temperature {compared.temperature:g}.</p>"
    )


def _head(compared: Compared, prompt: int, seed: int) -> str:
    text = compared.prompts[prompt]
    cut = "\u2026 " if len(text) > _MAX_PROMPT else ""
    return f"<h4><bdi>{cut}{escape(text[-_MAX_PROMPT:])}</bdi> \u00b7 seed {seed}</h4>"


def _row(compared: Compared, continuation: Continuation) -> str:
    base, read = compared.unsteered(continuation), compared.read_back(continuation)
    numbers = [] if read is None else [f"read back {read:.2f}"]
    numbers += [] if base is continuation else [f"cost {signed(continuation.nll - base.nll, 2)}"]
    names = f"<b>{arm_name(continuation)}</b>" + "".join(f"<span>{one}</span>" for one in numbers)
    label = f"surprise of each token, {continuation.nll:.2f} nats on average"
    bars = f'<div class="sc-bars" role="img" aria-label="{label}">{strip(continuation.log_probs)}</div>'
    return _grid(names, f'<div class="sc-text"><bdi>{tokens_html(compared, continuation)}</bdi></div>{bars}')


def _grid(names: str, text: str) -> str:
    return f'<div class="sc-row"><div class="sc-n">{names}</div><div>{text}</div></div>'


def tokens_html(compared: Compared, continuation: Continuation) -> str:
    """The text in runs: what the unsteered text has too, what is new, and where a feature fires."""
    kept = kept_tokens(compared, continuation)
    is_base = compared.unsteered(continuation) is continuation

    def kind(group: Group) -> str:
        tokens = range(group.start, group.stop)
        if any(compared.fires(continuation, token) for token in tokens):
            return "mark"
        return "i" if not is_base and all(kept[token] for token in tokens) else ""

    shown = []
    for name, run in groupby(display_groups(continuation.pieces), kind):
        text = _text(run)
        shown.append(f"<{name}>{text}</{name}>" if name else text)
    return "".join(shown)


def _text(run: Iterable[Group]) -> str:
    lines = "".join(group.text for group in run).split("\n")
    return "<br>".join(escape(line) for line in lines)


def _share(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.2f}"
