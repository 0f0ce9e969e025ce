"""How far a label holds: detection and fuzzing, each with its counts, an interval, and the examples it fails on.

Detection: is the label enough to tell texts in which the feature fires from others? Fuzzing: to tell tokens on which it fires
from others in the same texts? (Paulo et al., "Automatically Interpreting Millions of Features in Large Language Models", arXiv
2410.13928, section 4.) The texts are a uniform sample of firings, examples of all quantiles, and near misses; none of them was
shown for the label.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from saelab.features.feature import Feature
from saelab.features.intervals import wilson
from saelab.features.records import Example
from saelab.labels import prompts
from saelab.labels.explainers import Explainer

Shown = set[tuple[int, int]]
"""Context and position of the examples that a label was made from."""
Score = dict[str, Any] | None
N_EACH = 10
"""Texts of each class."""
_MAX_TOKENS = 120


class Case(NamedTuple):
    """One text, whether the answer should choose it, and where it is from."""

    text: str
    fits: bool
    kind: str
    example: Example


def score(cases: Sequence[Case], chosen: set[int]) -> dict[str, Any]:
    """Balanced accuracy with a 95 % interval, the counts of both classes, and the cases that were judged wrong."""
    right = [
        sum((i in chosen) == case.fits for i, case in enumerate(cases) if case.fits == side) for side in (True, False)
    ]
    n = [sum(case.fits == side for case in cases) for side in (True, False)]
    rates = [hits / max(count, 1) for hits, count in zip(right, n, strict=True)]
    bounds = [wilson(hits, count) for hits, count in zip(right, n, strict=True)]
    balanced = sum(rates) / 2
    # Of a mean of two independent shares: each side's distance to its bound, added in squares.
    low = balanced - math.hypot(*(rate - bound[0] for rate, bound in zip(rates, bounds, strict=True))) / 2
    high = balanced + math.hypot(*(bound[1] - rate for rate, bound in zip(rates, bounds, strict=True))) / 2
    fails = [
        {"kind": case.kind, "context": case.example.where[0], "position": case.example.where[1], "fits": case.fits}
        for i, case in enumerate(cases)
        if (i in chosen) != case.fits
    ]
    return {
        "balanced_accuracy": balanced, "interval": [max(low, 0.0), min(high, 1.0)], "n_positive": n[0], "n_negative": n[1],
        "found": right[0], "rejected": right[1], "fails": fails,
    }  # fmt: skip


def detection(
    feature: Feature, label: str, explainer: Explainer, shown: set[tuple[int, int]], seed: int
) -> dict[str, Any] | None:
    """The score of a label at telling texts apart; None if the answer is no list of numbers."""
    draw = random.Random(seed)
    positive = _unseen([("uniform", one) for one in feature.examples(kind="uniform")], shown, draw)
    positive += _unseen([("quantile", one) for one in feature.examples(kind="quantile")], shown, draw)
    negative = [("near_miss", one) for one in feature.examples(kind="near_miss") if not any(one.values)]
    negative += _others(feature, draw)
    cases = [Case(prompts.plain(one), True, kind, one) for kind, one in _first(positive)]
    cases += [Case(prompts.plain(one), False, kind, one) for kind, one in _first(negative)]
    return _asked(prompts.detect, label, cases, explainer, draw)


def fuzzing(
    feature: Feature, label: str, explainer: Explainer, shown: set[tuple[int, int]], seed: int
) -> dict[str, Any] | None:
    """The score of a label at telling marked tokens apart; None if the answer is no list of numbers."""
    draw = random.Random(seed + 1)
    unseen = _unseen([("uniform", one) for one in feature.examples(kind="uniform")], shown, draw)
    cases = []
    for i, (kind, one) in enumerate(unseen[: 2 * N_EACH]):
        silent = [at for at, value in enumerate(one.values) if not value and abs(at - one.peak) <= prompts.RIGHT]
        if i % 2 == 0:
            cases.append(Case(prompts.marked(one), True, kind, one))
        elif silent:
            cases.append(Case(prompts.marked(one, draw.choice(silent)), False, kind, one))
    return _asked(prompts.fuzz, label, cases, explainer, draw)


def _asked(
    question: Any, label: str, cases: list[Case], explainer: Explainer, draw: random.Random
) -> dict[str, Any] | None:
    if len({case.fits for case in cases}) < 2:
        return None
    draw.shuffle(cases)
    answer = explainer.ask(question(label, [case.text for case in cases]), _MAX_TOKENS)
    chosen = prompts.numbers(answer, len(cases))
    return None if chosen is None else score(cases, chosen)


def _unseen(found: list[tuple[str, Example]], shown: Shown, draw: random.Random) -> list[tuple[str, Example]]:
    left = [(kind, one) for kind, one in found if one.where not in shown]
    draw.shuffle(left)
    return left


def _first(found: list[tuple[str, Example]]) -> list[tuple[str, Example]]:
    """One example per document, `N_EACH` at most."""
    by_document = {one.document: (kind, one) for kind, one in reversed(found)}
    return list(by_document.values())[-N_EACH:]


def _others(feature: Feature, draw: random.Random) -> list[tuple[str, Example]]:
    """Examples of other features in documents in which none of this one is stored."""
    store = feature.store
    documents = {one.document for kind in ("top", "uniform") for one in feature.examples(kind=kind)}
    result: list[tuple[str, Example]] = []
    for index in draw.sample(range(store.d_sae), min(store.d_sae, 6 * N_EACH)):
        found = store.feature(index).examples(1, kind="uniform") if index != feature.feature else []
        result += [("other feature", one) for one in found if one.document not in documents]
    return result
