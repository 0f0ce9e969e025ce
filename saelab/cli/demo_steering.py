"""The demo's last step: a short search for features that steer, and the two best at three strengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from saelab.steering.candidates import draw_candidates
from saelab.steering.find import find
from saelab.steering.found import MOST_NATS, WORKS, Found, Row

if TYPE_CHECKING:
    from saelab.features.store import FeatureStore
    from saelab.models import LanguageModel

STRENGTHS = (2.0, 1.0, 3.0)
_CANDIDATES, _SHOWN = 24, 2


def steering_lines(lm: LanguageModel, store: FeatureStore) -> Iterator[str]:
    """What the demo prints of its search."""
    candidates = _candidates(store)
    if not candidates:
        yield "No feature fired; train on more tokens."
        return
    found = find(store, lm, features=candidates, strengths=STRENGTHS)
    yield from _summary(found)
    for row in found.rows[:_SHOWN]:
        yield from _row(row, found)


def _candidates(store: FeatureStore) -> list[int]:
    """A seeded draw; of a store without such features, those that fired most often."""
    try:
        return draw_candidates(store, _CANDIDATES)
    except ValueError:
        return store.features("n_fired", True, {"n_fired": (1, None)})[:_CANDIDATES]


def _summary(found: Found) -> Iterator[str]:
    n, failed = len(found.rows), len(found.rows) - len(found.working)
    yield (
        f"Of {n} features that were tried, {failed} ({found.failed_share:.0%}) failed: they read back on under {WORKS:.0%} of "
        f"the text above unsteered text, or cost more than {MOST_NATS:g} nat per token."
    )
    if not found.working:
        yield "So none of them steers this model well; the best:"


def _row(row: Row, found: Found) -> Iterator[str]:
    label = f" ({row.label})" if row.label else ""
    yield ""
    yield (
        f"feature {row.feature}{label}: best at {row.strength:g} times its p99; reads back on {row.read_back:+.0%} of the text, "
        f"costs {row.nll_cost:+.2f} nats per token"
    )
    # The prompt on which its best text reads back most.
    prompt = max(row.best, key=lambda trial: trial.score).prompt
    start = found.settings.prompts[prompt]
    yield f"  unsteered  {start + found.unsteered[prompt]!r}"
    for strength in sorted(STRENGTHS):
        for trial in row.at(strength):
            if trial.prompt == prompt:
                yield f"  {strength:g} p99      {start + trial.text!r}"
