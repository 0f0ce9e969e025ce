"""`SteeringReport`: what `steering_report` returns, as numbers, as a card in a notebook, as a table in a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saelab.features.visible import visible
from saelab.steering.report_html import report_card, save_report
from saelab.steering.reported import Reported, cell, columns

_LEFT, _COLUMN = 32, 22
"""Characters that the first two columns take, and that each other one takes."""


class SteeringReport(Reported):
    """The report: `rows` hold the numbers, `best`, `elbow`, `area(way)` and `verdict()` what follows, `data()` plain values."""

    def _repr_html_(self) -> str:
        return report_card(self)

    def save(self, path: str | Path) -> Path:
        """Write the card as an HTML file that stands on its own; returns its path."""
        return save_report(self, path)

    def show(self, console: Console | None = None) -> None:
        """Print the table, the verdict, and a text of each way at the best strength."""
        console, every = console or Console(), columns(self)
        shown = every[: max(2, (console.width - _LEFT) // _COLUMN)]
        title = visible(f"Feature {self.feature} {self.label}").strip()
        table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
        for column in ("way", "p99", *(name for name, _ in shown)):
            table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.way, "" if row.strength is None else f"{row.strength:g}", *(cell(of(row)) for _, of in shown)
            )
        console.print(table)
        if left_out := [name for name, _ in every[len(shown) :]]:
            console.print(f"A wider terminal and the card also show: {', '.join(left_out)}.")
        console.print(self.verdict())
        for way, text in self.examples():
            console.print(f"[bold]{way}[/bold]: {escape(visible(text))}")
