"""What `steering_report` found: one row for each way to steer and strength, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from saelab.steering.bootstrap import Estimate
from saelab.steering.probe import Probe
from saelab.steering.report_ways import FEATURE, RANDOM_DIRECTION, RANDOM_FEATURE


class ReportRow(NamedTuple):
    """One way to steer at one strength: means over prompts and seeds with 95 % intervals. All changes are from the unsteered
    texts of the same prompts and seeds."""

    way: str
    strength: float | None
    """In p99 of the feature; a control's norm is the same. None for the prompt that asks."""
    read_back: Estimate
    """Share of the tokens on which the feature exceeds a quarter of its p99, as the unsteered model and SAE read them."""
    probe: Estimate | None
    """Probability of the concept in the text, where labelled texts were given."""
    peak_rise: Estimate | None
    """Rise of the tokens at the feature's peaks along neutral texts, in nats."""
    promoted_rise: Estimate | None
    """Rise of the tokens whose logits its decoder row raises most; None off the residual stream."""
    nll_cost: Estimate
    """How much less likely what was written is under the unsteered model, in nats per token."""
    neutral_cost: Estimate | None
    """How much less likely neutral texts become under the steered model, in nats per token: the log of the rise in perplexity."""
    kl: Estimate | None
    """KL divergence of the steered from the unsteered predictions along neutral texts, in nats."""
    repetition: float
    """Share of the 4-grams that stood before in the same text."""
    distinct: float
    """Share of the bigrams that differ among the texts of a prompt."""
    score: Estimate
    """Read-back times fluency."""
    example: str
    """The first text."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        named = self._asdict()
        return {name: one._asdict() if isinstance(one, Estimate) else one for name, one in named.items()}


@dataclass(frozen=True, eq=False)
class Reported:
    """The rows of all ways, the feature's first."""

    feature: int
    label: str
    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    n_neutral: int
    """Neutral texts."""
    unsteered: str
    """The first unsteered text."""
    rows: tuple[ReportRow, ...]
    ask: str
    """What was put before the prompts to ask for the concept; "" if that was left out."""
    probe: Probe | None

    def of(self, way: str) -> list[ReportRow]:
        """The rows of one way, by strength; [] for an unknown one."""
        return [row for row in self.rows if row.way == way]

    @property
    def ways(self) -> list[str]:
        """The ways, the feature first."""
        return list(dict.fromkeys(row.way for row in self.rows))

    @property
    def best(self) -> ReportRow | None:
        """The feature's row with the largest score; None where no score is above 0 and the random controls of its strength, by
        intervals that do not overlap: it does not steer."""
        controls = [*self.of(RANDOM_DIRECTION), *self.of(RANDOM_FEATURE)]

        def stands_out(row: ReportRow) -> bool:
            return row.score.low > max([0.0, *(one.score.high for one in controls if one.strength == row.strength)])

        return max(filter(stands_out, self.of(FEATURE)), key=lambda row: row.score.mean, default=None)

    @property
    def elbow(self) -> ReportRow | None:
        """The feature's row from which on more strength costs more than it brings: the one where effect exceeds cost most, both
        as shares of their largest. None where nothing is read back."""
        rows = [row for row in self.of(FEATURE) if row.read_back.low > 0]
        if not rows:
            return None
        most, dearest = max(row.read_back.mean for row in rows), max(max(row.nll_cost.mean for row in rows), 1e-9)
        return max(rows, key=lambda row: row.read_back.mean / most - max(row.nll_cost.mean, 0.0) / dearest)

    def area(self, way: str = FEATURE, most_nats: float = 1.0) -> float:
        """Mean read-back over costs from 0 to `most_nats`, of the best strength that each cost can pay for: the area under effect
        against cost. 0 for a way that is never read back."""
        points = sorted((max(row.nll_cost.mean, 0.0), row.read_back.mean) for row in self.of(way))
        total, reached, at = 0.0, 0.0, 0.0
        for cost, effect in points:
            if cost > most_nats:
                break
            total += reached * (cost - at)
            reached, at = max(reached, effect), cost
        return (total + reached * (most_nats - at)) / most_nats

    def data(self) -> dict[str, Any]:
        """Everything as plain values, which JSON can hold."""
        best, elbow = self.best, self.elbow
        return {
            "feature": self.feature, "label": self.label, "model": self.model, "prompts": list(self.prompts),
            "seeds": list(self.seeds), "n_neutral": self.n_neutral, "unsteered": self.unsteered, "ask": self.ask,
            "best_strength": best and best.strength, "elbow_strength": elbow and elbow.strength,
            "area": {way: self.area(way) for way in self.ways}, "rows": [row.as_json() for row in self.rows],
        }  # fmt: skip

    def verdict(self) -> str:
        """What came out, in a sentence or two."""
        best = self.best
        if best is None:
            return (
                "At none of these strengths is the feature read back in fluent text more than under random controls: it does not "
                "steer."
            )
        rivals = [row for row in self.rows if row.way != FEATURE and row.strength in (best.strength, None)]
        ahead = [row.way for row in rivals if row.score.low > best.score.high]
        level = [row.way for row in rivals if row.way not in ahead and row.score.high >= best.score.low]
        said = f"Best at {best.strength:g} p99: read back {best.read_back}, cost {best.nll_cost} nats per token."
        said += f" Better, by intervals that do not overlap: {', '.join(ahead)}." if ahead else ""
        return said + (f" Not told apart from: {', '.join(level)}." if level else "")

    def examples(self) -> list[tuple[str, str]]:
        """The first unsteered text, and the first of each way at the best strength, or the middle one where there is none."""
        strengths = [row.strength for row in self.of(FEATURE)]
        at = self.best.strength if self.best else strengths[len(strengths) // 2]
        shown = [row for row in self.rows if row.strength in (at, None)]
        return [("unsteered", self.unsteered), *((row.way, row.example) for row in shown)]


def columns(report: Reported) -> Sequence[tuple[str, Any]]:
    """The columns that a table shows: a name, and what takes the value from a row. Those that no row has are left out."""
    every = {
        "read back": lambda row: row.read_back, "concept": lambda row: row.probe, "cost, nats": lambda row: row.nll_cost,
        "score": lambda row: row.score, "peak tokens, nats": lambda row: row.peak_rise,
        "promoted tokens, nats": lambda row: row.promoted_rise, "neutral text, nats": lambda row: row.neutral_cost,
        "KL": lambda row: row.kl, "repeated": lambda row: row.repetition, "distinct": lambda row: row.distinct,
    }  # fmt: skip
    return [(name, of) for name, of in every.items() if any(of(row) is not None for row in report.rows)]


def cell(value: Estimate | float | None) -> str:
    """A value of the table; an interval stands behind its mean."""
    if value is None:
        return "\u2013"
    text = f"{value.mean:+.2f} [{value.low:+.2f}, {value.high:+.2f}]" if isinstance(value, Estimate) else f"{value:.2f}"
    return text.replace("-", "\u2212")
