"""What became of the features of a crosscoder that look specific to one of two sources, and what follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from saelab.features.intervals import wilson

SPECIFIC, SHRUNK, DECOUPLED = "specific", "complete shrinkage", "latent decoupling"
NOT_HELD, RARE, DEAD = "not held", "too rare to judge", "dead"
MEANING = {
    SPECIFIC: "survives Latent Scaling",
    SHRUNK: "the other model's activations contain it (nu_error), though its decoder row there is small",
    DECOUPLED: "other features write its direction into the other model (nu_reconstruction)",
    NOT_HELD: "its own model's activations do not contain it",
    RARE: "fires on too few tokens here",
    DEAD: "fires on no token here",
}
"""What a verdict says of a feature that looks specific by its decoder norms."""
ARTEFACTS = (SHRUNK, DECOUPLED, NOT_HELD)


class Interval(NamedTuple):
    """A number with its 95 % interval; NaN where it is not known."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "\u2013"
        text = f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]" if math.isfinite(self.low) else f"{self.value:.2f}"
        return text.replace("-", "\u2212")

    @property
    def percent(self) -> str:
        """As a share."""
        return f"{self.value:.2%} [{self.low:.2%}, {self.high:.2%}]" if math.isfinite(self.low) else f"{self.value:.2%}"


class Related(NamedTuple):
    """Whether a feature has to do with the change: documents in which it fires, of those that show it and of the others."""

    n_changed: int
    n_other: int
    difference: Interval
    """Of the two shares."""
    q: float
    related: bool
    """Fires in more documents that show the change, at a false discovery rate of 5 %."""


class DiffFeature(NamedTuple):
    """A feature that looks specific to one side by its decoder norms, and what became of that."""

    feature: int
    side: str
    """ "a" or "b"."""
    delta: float
    """Relative decoder norm, from 0 for a only to 1 for b only."""
    cosine: float
    n_fired: int
    density: Interval
    nu_error: Interval
    nu_reconstruction: Interval
    verdict: str
    """One of `MEANING`."""
    reasons: tuple[str, ...]
    """Every reason why it is an artefact."""
    sure: bool
    """The verdict holds at both ends of the intervals."""
    related: Related | None
    label: str | None = None
    tokens: tuple[str, ...] = ()
    """The commonest tokens at its peaks, from the feature store."""

    @property
    def said(self) -> str:
        """The verdict in words."""
        told = " and ".join(self.reasons) if self.reasons else self.verdict
        return told if self.sure or self.verdict in (RARE, DEAD) else f"{told}, not for sure"


@dataclass(frozen=True, eq=False)
class Judged:
    """All candidates, counts of the others, and how all was measured."""

    about: dict[str, Any]
    """The crosscoder, the sources ("a", "b", "kind"), the texts, the thresholds, the baseline of random directions, and the
    number of features of each class ("counts")."""
    features: tuple[DiffFeature, ...]
    cloud: dict[str, list[Any]]
    """"feature", "delta", "nu_error" and "nu_reconstruction" of every feature that fires often enough, for a plot."""

    def of(self, verdict: str, side: str = "") -> list[DiffFeature]:
        """The candidates with this verdict, of both sides or one; "artefact" stands for all three kinds."""
        wanted = ARTEFACTS if verdict == "artefact" else (verdict,)
        return [one for one in self.features if one.verdict in wanted and side in ("", one.side)]

    @property
    def specific(self) -> list[DiffFeature]:
        """The candidates that survive."""
        return self.of(SPECIFIC)

    def survival(self, side: str) -> Interval | None:
        """The share of the judged candidates of a side that survive, with Wilson's interval; None where there is none."""
        n, n_judged = len(self.of(SPECIFIC, side)), len(self.of(SPECIFIC, side)) + len(self.of("artefact", side))
        return Interval(n / n_judged, *map(float, wilson(n, n_judged))) if n_judged else None

    def conclusions(self) -> list[str]:
        """What came out, a sentence for each side and one for each caution."""
        said = [self._of_side(side) for side in "ab"]
        if not self.features:
            said.append("Relative norms range from {:.2f} to {:.2f}.".format(*self.about["norms"]))
        if self.about["kind"] == "layers":
            said.append("Both sources are of one model: what differs is the layer, and no training lies between them.")
        base = self.about["baseline"]
        if base["nu_error"] is not None:
            said.append(
                f"Random directions of their norms in the place of those judged have |nu_error| below {base['nu_error']:.2f} and "
                f"|nu_reconstruction| below {base['nu_reconstruction']:.2f}, 95 % of {base['n']:,} of them."
            )
        said += self._of_fit()
        if changed := self.about["changed"]:
            said.append(self._of_change(changed))
        return said

    def __str__(self) -> str:
        return "\n".join(self.conclusions())

    def _of_fit(self) -> list[str]:
        """How good the crosscoder is on this text; reports of an earlier version do not tell."""
        fvu, l0 = self.about.get("fvu"), self.about.get("l0")
        if fvu is None or l0 is None or None in fvu.values():
            return []
        each = " and ".join(f"{fvu[side]:.1%} of {self.about[side]}" for side in "ab")
        text = self.about["split"].replace("_", "-")
        return [f"The crosscoder leaves {each} unexplained (FVU, {text}), with an L0 of {l0:.1f}."]

    def _of_change(self, changed: dict[str, Any]) -> str:
        text = f"{changed['n_changed']:,} of {changed['n_changed'] + changed['n_other']:,} documents show the change"
        if not changed["enough"]:
            return f"{text}. No claim is made with so few of either kind."
        related = [one for one in self.specific if one.related and one.related.related]
        rest = [one for one in self.specific if one not in related]
        told = f"; fire in more of these than of the others: {len(related)} specific features ({_listed(related) or 'none'})"
        return text + told + (f"; have nothing to do with it as far as this tells: {_listed(rest)}." if rest else ".")

    def _of_side(self, side: str) -> str:
        name, candidates = self.about[side], [one for one in self.features if one.side == side]
        n = len(self.of(SPECIFIC, side))
        told = [
            f"{len(found)} {word}"
            for word, found in (
                ("by complete shrinkage", [one for one in candidates if SHRUNK in one.reasons]),
                ("by latent decoupling", [one for one in candidates if DECOUPLED in one.reasons]),
                ("not held by its own source", self.of(NOT_HELD, side)),
            )
            if found
        ]
        rest = [f"{len(found)} {verdict}" for verdict in (RARE, DEAD) if (found := self.of(verdict, side))]
        share = self.survival(side)
        text = f"Only {name}: {len(candidates)} of {self.about['d_sae']:,} features by their decoder norms"
        if share is not None:
            text += (
                f"; {n} survive Latent Scaling, {share.value:.0%} [{share.low:.0%}, {share.high:.0%}] of those judged"
            )
        n_artefacts = len(self.of("artefact", side))
        text += (
            f"; {n_artefacts} {'is an artefact' if n_artefacts == 1 else 'are artefacts'} ({', '.join(told)})"
            if told
            else ""
        )
        return f"{text}; {', '.join(rest)}." if rest else f"{text}."


def _listed(features: Sequence[DiffFeature]) -> str:
    return ", ".join(str(one.feature) for one in features[:12]) + (", \u2026" if len(features) > 12 else "")
