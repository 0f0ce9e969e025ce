"""Steered and unsteered texts with their numbers: how far a text reads back as the feature, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from saelab.models.applied import HookReport
from saelab.steering.plan import Plan


class FeatureRead(NamedTuple):
    """A feature whose firing in the texts is told."""

    feature: int
    hook_name: str
    label: str
    threshold: float
    """It is read back where its value exceeds this."""
    in_p99: bool
    """Whether values are in p99; otherwise magnitudes in the SAE's own units."""


class Continuation(NamedTuple):
    """One continuation of a prompt, as the unsteered model and SAE read it."""

    prompt: int
    seed: int
    strength: float | None
    """None: unsteered."""
    control: bool
    """Whether random directions of equal norm took the place of the edits."""
    text: str
    """Without the prompt and special tokens."""
    ids: tuple[int, ...]
    """The new tokens."""
    pieces: tuple[bytes, ...]
    """Their bytes."""
    log_probs: tuple[float, ...] = ()
    """Of each, in nats, under the unsteered model."""
    values: tuple[tuple[float, ...], ...] = ()
    """Of each feature that is read, at each token."""

    @property
    def nll(self) -> float:
        """Mean negative log-probability under the unsteered model, in nats per token."""
        return -fmean(self.log_probs)

    @property
    def repeated(self) -> float:
        """Share of its pairs of neighbouring tokens that stood in it before: near 1 for a loop."""
        pairs = list(zip(self.ids, self.ids[1:], strict=False))
        return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0

    @property
    def arm(self) -> tuple[float | None, bool]:
        """Its strength, and whether it is a control."""
        return self.strength, self.control


@dataclass(frozen=True, eq=False)
class Compared:
    """The texts of every prompt, strength and seed."""

    plan: Plan
    """The edits at strength 1."""
    prompts: tuple[str, ...]
    features: tuple[FeatureRead, ...]
    texts: tuple[Continuation, ...]
    """By prompt, then by arm (the unsteered first), then by seed."""
    model: str
    max_new_tokens: int
    temperature: float
    report: tuple[HookReport, ...] = ()
    """What the edits did in the last batch: `lm.last_report`."""

    def unsteered(self, continuation: Continuation) -> Continuation:
        """The unsteered text of the same prompt and seed."""
        return self._unsteered[continuation.prompt, continuation.seed]

    @property
    def _unsteered(self) -> dict[tuple[int, int], Continuation]:
        return {(one.prompt, one.seed): one for one in self.texts if one.strength is None}

    def fires(self, continuation: Continuation, token: int) -> bool:
        """Whether any of the features is read back on this token."""
        return any(
            values[token] > feature.threshold
            for feature, values in zip(self.features, continuation.values, strict=True)
        )

    def read_back(self, continuation: Continuation) -> float | None:
        """Share of its tokens on which a feature is read back, the mean over the features; None where none can be read."""
        pairs = zip(self.features, continuation.values, strict=True)
        shares = [fmean(value > feature.threshold for value in values) for feature, values in pairs]
        return fmean(shares) if shares else None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict for each text: its prompt, seed and strength, the text, and its numbers."""
        unsteered, rows = self._unsteered, []
        for one in self.texts:
            base, read = unsteered[one.prompt, one.seed], self.read_back(one)
            rise = None if read is None else read - (self.read_back(base) or 0.0)
            rows.append({
                "prompt": self.prompts[one.prompt], "seed": one.seed, "strength": one.strength, "control": one.control,
                "text": one.text, "n_tokens": len(one.ids), "read_back": read, "read_back_rise": rise, "nll": one.nll,
                "nll_cost": one.nll - base.nll, "repeated": one.repeated,
            })  # fmt: skip
        return rows

    @property
    def summary(self) -> list[dict[str, Any]]:
        """One dict for each arm: the means of `rows` over prompts and seeds."""
        arms: dict[Any, list[dict[str, Any]]] = {}
        for row in self.rows:
            arms.setdefault((row["strength"], row["control"]), []).append(row)
        numbers = ("read_back", "read_back_rise", "nll", "nll_cost", "repeated")
        return [
            {"strength": strength, "control": control, "n_texts": len(rows)}
            | {name: None if rows[0][name] is None else fmean(row[name] for row in rows) for name in numbers}
            for (strength, control), rows in arms.items()
        ]

    def data(self) -> dict[str, Any]:
        """Everything as plain values, which JSON can hold; the plan as its own JSON text is `plan.to_json()`."""
        details = [
            {"tokens": [piece.decode("utf-8", "backslashreplace") for piece in one.pieces]}
            | {"token_ids": list(one.ids), "log_probs": list(one.log_probs), "values": [list(v) for v in one.values]}
            for one in self.texts
        ]
        return {
            "model": self.model, "max_new_tokens": self.max_new_tokens, "temperature": self.temperature,
            "features": [feature._asdict() for feature in self.features], "summary": self.summary,
            "texts": [row | detail for row, detail in zip(self.rows, details, strict=True)],
        }  # fmt: skip
