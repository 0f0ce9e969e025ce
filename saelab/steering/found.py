"""What `find` found: one row per candidate, sorted by score, with the texts it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saelab.features.visible import visible
from saelab.steering.criteria import Criteria, rank_correlations
from saelab.steering.trials import Settings, Trial

WORKS = 0.2
"""Read-back above the unsteered text from which a feature counts as one that steers."""
MOST_NATS = 1.0
"""Cost in nats per token up to which it does."""
FEWEST_TO_CORRELATE = 10
"""Candidates from which on rank correlations are shown."""
_OF_STORE = ("density", "sharpness", "label_share", "p99", "promoted_logit", "promoted_z")


class Row(NamedTuple):
    """One candidate at its best strength; means over the prompts."""

    feature: int
    label: str | None
    """Written by hand or a model, else the commonest words at the peaks of its strongest examples."""
    steer_score: float
    """Read-back times fluency."""
    strength: float
    """The best one, in p99."""
    read_back: float
    """Share of the text on which the feature fires, above the unsteered text."""
    nll_cost: float
    """Nats per token under the unsteered model, above the unsteered text."""
    fluency: float
    output_score: float | None
    confidence_change: float
    trials: tuple[Trial, ...]
    """All of them, at every strength that was tried."""

    @property
    def works(self) -> bool:
        return self.read_back >= WORKS and self.nll_cost <= MOST_NATS and self.fluency > 0

    @property
    def best(self) -> tuple[Trial, ...]:
        """The trials at the best strength."""
        return tuple(trial for trial in self.trials if trial.strength == self.strength)

    def at(self, strength: float) -> tuple[Trial, ...]:
        """The trials at one strength; () where it was not tried."""
        return tuple(trial for trial in self.trials if trial.strength == strength)

    def as_json(self) -> dict[str, Any]:
        """What the annotations keep."""
        return {
            "score": self.steer_score, "strength": self.strength, "read_back": self.read_back, "nll_cost": self.nll_cost,
            "fluency": self.fluency, "output_score": self.output_score, "confidence_change": self.confidence_change,
            "n_texts": len(self.best),
        }  # fmt: skip


class Found(NamedTuple):
    """The result of `find`."""

    rows: tuple[Row, ...]
    """The best first."""
    settings: Settings
    unsteered: tuple[str, ...]
    """The continuation of each prompt without steering."""
    path: Path
    """Where the trials are kept."""
    known: dict[int, dict[str, float | None]]
    """Of each feature: what its store says that might predict how it steers."""

    @property
    def working(self) -> list[Row]:
        """The rows with a read-back of at least 0.2 that cost at most 1 nat per token."""
        return [row for row in self.rows if row.works]

    @property
    def failed_share(self) -> float:
        """The share of the candidates that did not work at any strength."""
        return 1 - len(self.working) / len(self.rows)

    def rank_correlations(self) -> dict[str, dict[str, float | None]]:
        """Spearman's correlation of what can be known beforehand with how the candidates steer: `criteria.py` and the store's
        columns, with the read-back and score at the strength that all were tried at, and with the best score."""
        first = self.rows[0].trials[0].strength
        tried = [row.at(first) for row in self.rows]
        criteria = {name: [self.known[row.feature].get(name) for row in self.rows] for name in _OF_STORE}
        criteria |= {name: [getattr(row, name) for row in self.rows] for name in Criteria._fields}
        outcomes = {
            "read_back": [mean([one.read_back for one in trials]) for trials in tried],
            "score": [mean([one.score for one in trials]) for trials in tried],
            "steer_score": [row.steer_score for row in self.rows],
        }
        return rank_correlations(criteria, outcomes)

    def show(self, n: int = 10, console: Console | None = None) -> None:
        """Print `told`."""
        console = console or Console()
        for one in self.told(n):
            console.print(one)

    def told(self, n: int = 10) -> list[Any]:
        """The best `n` rows, each with a text; the share that failed; the rank correlations: rich tables and text."""
        table = Table(title=f"{len(self.rows)} features tried on {len(self.settings.prompts)} prompts")
        for name in ("feature", "label", "score", "strength", "read-back", "cost (nats)", "text"):
            table.add_column(name, justify="left" if name in ("label", "text") else "right")
        for row in self.rows[:n]:
            numbers = f"{row.steer_score:.2f}", f"{row.strength:g}", f"{row.read_back:.2f}", f"{row.nll_cost:+.2f}"
            text = " ".join(row.best[0].text.split())
            table.add_row(str(row.feature), escape(visible(row.label or "")), *numbers, escape(visible(text)))
        summary = (
            f"{len(self.working)} of {len(self.rows)} candidates read back on at least {WORKS:.0%} more of the text at a cost of "
            f"at most {MOST_NATS:g} nat per token; {self.failed_share:.0%} failed."
        )
        enough = len(self.rows) >= FEWEST_TO_CORRELATE
        return [table, summary, *([_correlations_table(self.rank_correlations())] if enough else [])]


def _correlations_table(found: dict[str, dict[str, float | None]]) -> Table:
    table = Table(title="Which criterion predicts what (Spearman)")
    for name in ("criterion", *next(iter(found.values()), {})):
        table.add_column(name, justify="left" if name == "criterion" else "right")
    for name, values in found.items():
        table.add_row(name, *("" if value is None else f"{value:+.2f}" for value in values.values()))
    return table


def mean(values: Sequence[float]) -> float:
    """Mean; raises `ZeroDivisionError` without values."""
    return sum(values) / len(values)


def row_of(feature: int, label: str | None, trials: Sequence[Trial], criteria: Criteria) -> Row:
    """The row of a feature at the strength with the largest mean score; of equal ones the largest read-back, then the weakest."""
    by_strength: dict[float, list[Trial]] = {}
    for trial in trials:
        by_strength.setdefault(trial.strength, []).append(trial)
    merit = {
        strength: (mean([one.score for one in group]), mean([one.read_back for one in group]), -strength)
        for strength, group in by_strength.items()
    }
    best = max(merit, key=merit.__getitem__)
    group = by_strength[best]
    return Row(
        feature,
        label,
        merit[best][0],
        best,
        merit[best][1],
        mean([one.nll_cost for one in group]),
        mean([one.fluency for one in group]),
        *criteria,
        tuple(trials),
    )


def best_score(trials: Sequence[Trial]) -> float:
    """The largest mean score at one strength."""
    return max(
        mean([one.score for one in trials if one.strength == strength]) for strength in {one.strength for one in trials}
    )


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Rows by score, those tried on most prompts first: what was tried on few prompts scores at most as the last of them, because
    it would have gone on if it were better."""
    most = max(len(row.best) for row in rows)
    lowest = min(row.steer_score for row in rows if len(row.best) == most)
    rows = [row if len(row.best) == most else row._replace(steer_score=min(row.steer_score, lowest)) for row in rows]
    return sorted(rows, key=lambda row: (-len(row.best), -row.steer_score, -row.read_back, row.feature))
