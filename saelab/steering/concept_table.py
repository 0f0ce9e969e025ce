"""What `concept_bench` returns: one line for each concept and method, and the mean of each method over the concepts."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saelab.features.visible import visible
from saelab.steering.bootstrap import Estimate, mean_interval


class Item(NamedTuple):
    """One text and its marks."""

    factor: float | None
    """None for the prompt that asks."""
    prompt: int
    """Its number; even ones choose the factor, odd ones are scored."""
    text: str
    concept: float | None
    """The marks; None where the judge gave none."""
    instruction: float | None
    fluency: float | None
    score: float | None
    """Harmonic mean of the marks, 0 if any is 0."""
    nll_cost: float
    """Nats per token under the unsteered model, above the unsteered text."""


class BenchRow(NamedTuple):
    """One method for one concept, at the factor that was best on the other half of the prompts."""

    concept_name: str
    method: str
    factor: float | None
    score: Estimate
    """Over the prompts that did not choose the factor."""
    n_unmarked: int
    """Texts, at all factors, to which the judge gave no marks: they are left out."""
    concept: float | None
    instruction: float | None
    fluency: float | None
    nll_cost: float | None
    items: tuple[Item, ...]
    """All texts, at every factor."""


class ConceptBench(NamedTuple):
    """The rows, concept by concept."""

    rows: tuple[BenchRow, ...]
    judge: str
    prompts: tuple[str, ...]
    model: str

    def methods(self) -> dict[str, Estimate]:
        """The mean score of each method, with a bootstrap interval over concepts."""
        scores: dict[str, list[float]] = {}
        for row in self.rows:
            scores.setdefault(row.method, []).append(row.score.mean)
        return {method: mean_interval(values) for method, values in scores.items()}

    def data(self) -> dict[str, Any]:
        """Everything as plain values, which JSON can hold."""
        rows = [
            row._asdict() | {"score": row.score._asdict(), "items": [one._asdict() for one in row.items]}
            for row in self.rows
        ]
        methods = {method: score._asdict() for method, score in self.methods().items()}
        return {
            "model": self.model,
            "judge": self.judge,
            "prompts": list(self.prompts),
            "methods": methods,
            "rows": rows,
        }

    def show(self, console: Console | None = None) -> None:
        """Print the table, and the mean of each method."""
        console = console or Console()
        table = Table(
            title=f"Marks by {escape(visible(self.judge))}, from 0 to 2, on prompts that did not choose the factor"
        )
        columns = ("concept", "method", "factor", "score", "concept mark", "instruction", "fluency", "cost, nats")
        for name in columns:
            table.add_column(name, justify="left" if name in ("concept", "method") else "right")
        for row in self.rows:
            factor = "" if row.factor is None else f"{row.factor:g}"
            marks = [
                "" if one is None else f"{one:.2f}" for one in (row.concept, row.instruction, row.fluency, row.nll_cost)
            ]
            table.add_row(escape(visible(row.concept_name)), escape(row.method), factor, str(row.score), *marks)
        console.print(table)
        if n := sum(row.n_unmarked for row in self.rows):
            console.print(f"{n} texts were left out: the judge gave them no marks.")
        for method, score in self.methods().items():
            console.print(f"{escape(method)}: {score}", highlight=False)
