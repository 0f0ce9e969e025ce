"""`Comparison`: what `compare` returns, as numbers, as a card in a notebook, as text in a terminal."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from textwrap import fill

from saelab.features.numbers import signed
from saelab.features.token_text import Group, display_groups
from saelab.features.visible import escape, visible
from saelab.files import atomic_write_text
from saelab.steering.compare_html import arm_name, compare_card, strip
from saelab.steering.compared import Compared, Continuation

_WIDTH = 110


class Comparison(Compared):
    """Texts side by side: `rows` and `summary` hold the numbers, `texts` the tokens, `data()` all of it as plain values."""

    def _repr_html_(self) -> str:
        return compare_card(self)

    def save(self, path: str | Path) -> Path:
        """Write the card as an HTML file that stands on its own; returns its path."""
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        title = escape(f"{self.prompts[0][:60]} \u00b7 saelab")
        atomic_write_text(
            path,
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="color-scheme" content="light dark">'
            f'<meta name="viewport" content="width=device-width"><title>{title}</title></head><body>{compare_card(self)}</body>'
            "</html>",
        )
        return Path(path)

    def __repr__(self) -> str:
        return "\n".join([*self.lines(), "", *self.numbers()])

    def numbers(self) -> list[str]:
        """The table of means as lines of text."""
        head = f"{'':>14}  read back  over unsteered  cost (nats/token)  repeated"
        lines = [head]
        for row in self.summary:
            strength = (
                "unsteered"
                if row["strength"] is None
                else f"{'random ' if row['control'] else ''}x {row['strength']:g}"
            )
            read = "-" if row["read_back"] is None else f"{row['read_back']:.2f}"
            rise, cost = (_signed(row[name]) for name in ("read_back_rise", "nll_cost"))
            lines.append(f"{strength:>14}  {read:>9}  {rise:>14}  {cost:>17}  {row['repeated']:>8.2f}")
        return lines

    def lines(self) -> list[str]:
        """The texts as lines of text, tokens on which a feature is read back in \u27e6 \u27e7, each with its strip."""
        lines, at = [], None
        for one in sorted(self.texts, key=lambda one: (one.prompt, one.seed)):
            if (one.prompt, one.seed) != at:
                at = one.prompt, one.seed
                lines += ["", f"{visible(self.prompts[one.prompt])} ... (seed {one.seed})"]
            lines += [*_wrapped(f"{arm_name(one):>12}  {self._marked(one)}"), " " * 14 + strip(one.log_probs)]
        return lines[1:]

    def _marked(self, continuation: Continuation) -> str:
        def fires(group: Group) -> bool:
            return any(self.fires(continuation, token) for token in range(group.start, group.stop))

        shown = []
        for here, run in groupby(display_groups(continuation.pieces), fires):
            text = visible("".join(group.text for group in run))
            word = text.lstrip(" ")
            shown.append(f"{text[: len(text) - len(word)]}\u27e6{word}\u27e7" if here else text)
        return "".join(shown)


def _signed(value: float | None) -> str:
    return "-" if value is None else signed(value, 2)


def _wrapped(text: str) -> list[str]:
    return fill(text, _WIDTH, subsequent_indent=" " * 14, drop_whitespace=False).split("\n")
