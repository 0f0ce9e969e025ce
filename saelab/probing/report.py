"""What probing found: a line for each method, and whether SAE probes add anything to the baselines ("quiver of arrows").

The comparison is that of Kantamneni et al. 2025 (`labelled_sets.py`): on every set the method with the best validation AUC is
taken, once from the baselines and once from the baselines and the SAE probes, and the two test AUCs are compared. Intervals
resample sets, in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

from saelab.probing.config import ProbeConfig
from saelab.probing.fitting import Outcome
from saelab.probing.methods import BASELINES
from saelab.steering.bootstrap import Estimate, mean_interval

Z = 1.96
"""Of a 95 % interval."""
FEWEST_SETS = 10
"""To claim a gain or a loss: the bootstrap's intervals are too narrow for a handful of sets."""
TITLES = {
    "raw": "logistic regression on activations",
    "pca": "PCA + logistic regression",
    "tokens": "tokens of the text",
    "all": "all SAE features",
}


class ProbedSet(NamedTuple):
    """A labelled set that was probed."""

    name: str
    origin: str
    positive: str
    n_texts: int


class Draw(NamedTuple):
    """The outcomes of one split."""

    set_name: str
    regime: str
    number: int
    outcomes: Mapping[str, Outcome]
    feature: int | None = None
    """The SAE feature that tells the training labels apart best."""

    def chosen(self, names: Sequence[str]) -> str:
        """The method with the best validation AUC; of equal ones the first."""
        return max(names, key=lambda name: self.outcomes[name].validation)


class MethodRow(NamedTuple):
    """One method in one regime, means over the splits of every set and then over the sets."""

    method: str
    auc: Estimate
    accuracy: float
    gain: Estimate
    """Its AUC minus that of the logistic regression on activations."""
    noise: float | None
    """The difference between the mean AUCs of two SAEs that re-drawn splits explain; None for one split."""


class Arrow(NamedTuple):
    """One set: test AUC of what validation chooses among the baselines, and with the SAE probes among the candidates."""

    set_name: str
    before: float
    after: float
    share: float
    """Of the splits on which an SAE probe was chosen."""


class ProbeReport:
    """The outcomes of `probe_sets`."""

    def __init__(self, sets: Sequence[ProbedSet], draws: Sequence[Draw], config: ProbeConfig, about: Mapping[str, Any]):
        self.sets, self.draws, self.config, self.about = list(sets), list(draws), config, dict(about)
        self.methods = list(draws[0].outcomes)
        self.regimes = list(dict.fromkeys(draw.regime for draw in draws))

    def of(self, regime: str) -> dict[str, list[Draw]]:
        """The splits of each set in a regime."""
        found: dict[str, list[Draw]] = {}
        for draw in self.draws:
            if draw.regime == regime:
                found.setdefault(draw.set_name, []).append(draw)
        return found

    def rows(self, regime: str) -> list[MethodRow]:
        """A line for each method."""
        draws = self.of(regime).values()

        def means(name: str, field: str) -> list[float]:
            return [fmean(getattr(draw.outcomes[name], field) for draw in of) for of in draws]

        base, rows = means("raw", "auc"), []
        for name in self.methods:
            found = means(name, "auc")
            gain = mean_interval([a - b for a, b in zip(found, base, strict=True)])
            noise = redraw_noise([[draw.outcomes[name].auc for draw in of] for of in draws])
            rows.append(MethodRow(name, mean_interval(found), fmean(means(name, "accuracy")), gain, noise))
        return rows

    def arrows(self, regime: str) -> list[Arrow]:
        """The quiver of a regime, an arrow for each set."""
        found = []
        for name, of in self.of(regime).items():
            before = fmean(draw.outcomes[draw.chosen(BASELINES)].auc for draw in of)
            after = fmean(draw.outcomes[draw.chosen(self.methods)].auc for draw in of)
            share = fmean(draw.chosen(self.methods) not in BASELINES for draw in of)
            found.append(Arrow(name, before, after, share))
        return found

    def gain(self, regime: str) -> Estimate:
        """What the SAE probes add to the baselines: the mean length of the arrows."""
        return mean_interval([arrow.after - arrow.before for arrow in self.arrows(regime)])

    def verdict(self, regime: str) -> str:
        """The gain in words."""
        gain, arrows = self.gain(regime), self.arrows(regime)
        said = "no gain" if gain.covers_zero else "a gain" if gain.mean > 0 else "a loss"
        if not gain.covers_zero and len(arrows) < FEWEST_SETS:
            said = f"too few sets to tell {said}"
        before, after, share = (fmean(getattr(one, field) for one in arrows) for field in ("before", "after", "share"))
        return (
            f"{regime}: {said} from SAE probes: AUC {before:.4f} with the baselines, {after:.4f} with SAE probes among the "
            f"candidates, {shown(gain)} over {counted(len(arrows), 'set')}; an SAE probe was chosen on {share:.0%} of the splits."
        )

    def believed(self, regime: str) -> str | None:
        """How large a difference between two SAEs has to be; None for one split."""
        rows = [row for row in self.rows(regime) if row.method not in BASELINES and row.noise is not None]
        if not rows:
            return None
        told = ", ".join(f"{row.noise:.4f} ({row.method})" for row in rows)
        return (
            f"{regime}: between two SAEs on these sets believe no difference in mean AUC below {told}: re-drawn splits alone "
            "make that much; training seeds of the SAE come on top."
        )

    def data(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            **self.about,
            "config": self.config.__dict__,
            "sets": [one._asdict() for one in self.sets],
            "regimes": {regime: self._regime(regime) for regime in self.regimes},
            "draws": [
                draw._asdict() | {"outcomes": {name: one._asdict() for name, one in draw.outcomes.items()}}
                for draw in self.draws
            ],
        }

    def _regime(self, regime: str) -> dict[str, Any]:
        methods = [row._asdict() | {"auc": row.auc._asdict(), "gain": row.gain._asdict()} for row in self.rows(regime)]
        arrows = [arrow._asdict() for arrow in self.arrows(regime)]
        told = {"verdict": self.verdict(regime), "believed": self.believed(regime)}
        return {"methods": methods, "gain": self.gain(regime)._asdict(), **told, "arrows": arrows}


def redraw_noise(aucs: Sequence[Sequence[float]]) -> float | None:
    """The difference between two means over sets that is exceeded once in twenty if only the splits differ; `aucs` holds the AUCs
    of each set's splits. None for one split."""
    if any(len(of) < 2 for of in aucs):
        return None
    return Z * math.sqrt(2 * sum(variance(of) / len(of) for of in aucs)) / len(aucs)


def counted(n: int, noun: str) -> str:
    """ "1 set", "2 sets"."""
    return f"{n} {noun}{'s' * (n != 1)}"


def title(method: str) -> str:
    """The name of a method for a reader."""
    features = method.removeprefix("k=")
    return TITLES.get(method, f"SAE features, the best {features}" if features != "1" else "the best SAE feature")


def shown(estimate: Estimate) -> str:
    """A difference of AUCs with its interval."""
    return f"{estimate.mean:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]"
