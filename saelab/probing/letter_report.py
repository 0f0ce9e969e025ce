"""What the first-letter task found: a line for each letter, and means over the letters that were measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from saelab.files import atomic_write_json
from saelab.steering.bootstrap import Estimate, mean_interval

N_RESAMPLES = 2000


class Letter(NamedTuple):
    """One letter. The lists hold a number for each held-out word that the probe on activations gets right."""

    letter: str
    n_words: int
    n_test: int
    """Words, and how many of them are held out."""
    n_right: int = 0
    """Held-out words that the probe on activations gets right."""
    probe_f1: float | None = None
    """Of that probe, on all held-out words."""
    reason: str | None = None
    """Why the letter was not measured; None if it was."""
    f1: Sequence[float] = ()
    """Of the probe on the best feature, on the best two, and so on."""
    main: Sequence[int] = ()
    """The features of the letter, the best first: as many as each raise F1 by 0.03."""
    full: Sequence[int] = ()
    """1 for a word on which the letter is absorbed by one feature, else 0."""
    fraction: Sequence[float] = ()
    """Absorption fraction of each word."""
    absorbed: Mapping[str, int] = {}
    """The absorbed words, each with the feature that absorbs."""
    n_against: int = 0
    """Words on which the activation points away from the probe, so that nothing counts as absorbed."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Letter:
        """The letter of what `_asdict` made, as it is or read from JSON."""
        fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in told.items()}
        return cls(**fields)

    @property
    def measured(self) -> bool:
        return self.reason is None


class LetterReport:
    """The outcome of `first_letters`."""

    def __init__(self, letters: Sequence[Letter], config: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.letters, self.config, self.about = list(letters), dict(config), dict(about)

    @property
    def measured(self) -> list[Letter]:
        """The letters with enough words and a good enough probe."""
        return [one for one in self.letters if one.measured]

    def mean(self, name: str) -> Estimate | None:
        """Mean over letters of the mean of `full` or `fraction` over words; the interval resamples words, letter by letter. None
        if no letter was measured."""
        lists = [np.asarray(getattr(one, name), dtype=float) for one in self.measured]
        if not lists:
            return None
        rng = np.random.default_rng(0)
        drawn = [of[rng.integers(0, len(of), (N_RESAMPLES, len(of)))].mean(1) for of in lists]
        low, high = np.quantile(np.mean(drawn, 0), (0.025, 0.975))
        return Estimate(float(np.mean([of.mean() for of in lists])), float(low), float(high))

    @property
    def n_main(self) -> float | None:
        """Features per letter, mean over letters."""
        return fmean(len(one.main) for one in self.measured) if self.measured else None

    def data(self) -> dict[str, Any]:
        """Everything, for JSON."""
        letters = [one._asdict() | (_rates(one) if one.measured else {}) for one in self.letters]
        means = {name: found and found._asdict() for name in ("full", "fraction") for found in (self.mean(name),)}
        probe = fmean(one.probe_f1 or 0.0 for one in self.measured) if self.measured else None
        first = fmean(one.f1[0] for one in self.measured) if self.measured else None
        told = {"n_measured": len(self.measured), "n_main": self.n_main, "probe_f1": probe, "f1_of_one_feature": first}
        return {**self.about, "config": self.config, **told, "absorption": means, "letters": letters}


def _rates(one: Letter) -> dict[str, Any]:
    return {f"{name}_rate": mean_interval(getattr(one, name))._asdict() for name in ("full", "fraction")}


def told(report: LetterReport) -> list[Any]:
    """A table, and the means in words."""
    table = Table(title="First letters: held-out words that the probe on activations gets right")
    for name in (
        "letter",
        "words",
        "probe F1",
        "F1 of one feature",
        "main features",
        "fully absorbed",
        "fraction",
        "by",
    ):
        table.add_column(name, justify="left" if name in ("letter", "main features", "by") else "right")
    for one in report.letters:
        table.add_row(*_cells(one))
    return [table, *_conclusions(report)]


def _cells(one: Letter) -> tuple[str, ...]:
    quality = "" if one.probe_f1 is None else f"{one.probe_f1:.2f}"
    if not one.measured:
        return one.letter, str(one.n_right), quality, "", str(one.reason), "", "", ""
    absorbers = Counter(one.absorbed.values()).most_common(2)
    examples = {feature: next(word for word, by in one.absorbed.items() if by == feature) for feature, _ in absorbers}
    by = ", ".join(f"{feature} ({n}, {examples[feature]})" for feature, n in absorbers)
    main = ", ".join(map(str, one.main))
    return one.letter, str(one.n_right), quality, f"{one.f1[0]:.2f}", main, _rate(one.full), _rate(one.fraction), by


def _rate(values: Sequence[float]) -> str:
    return _shown(mean_interval(values))


def _shown(found: Estimate) -> str:
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _conclusions(report: LetterReport) -> list[str]:
    full, fraction = report.mean("full"), report.mean("fraction")
    if full is None or fraction is None:
        return ["No letter has enough words and a probe that is good enough: give more words, or another hook."]
    return [
        f"Splitting: a letter takes {report.n_main:.2f} features, mean over {len(report.measured)} letters.",
        f"Full absorption {_shown(full)}, absorption fraction {_shown(fraction)}; intervals of 95 % from resampling words.",
    ]


def save(report: LetterReport, path: Path) -> Path:
    """Write the JSON."""
    atomic_write_json(path, report.data())
    return path
