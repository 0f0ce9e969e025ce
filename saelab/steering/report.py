"""`steering_report`: what steering with one feature reaches and costs, beside controls that push as hard and a prompt that asks.

Every way steers at every strength, on the same prompts with the same random numbers. The *unsteered* model and the SAE read what
came out (effect, cost, repetition, diversity); along neutral texts that stay as they are, the steered model's predictions
are compared with the unsteered ones (perplexity, KL, promoted tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from saelab.models import LanguageModel
from saelab.steering.find import PROMPTS
from saelab.steering.probe import Probe, probe
from saelab.steering.report_shown import SteeringReport
from saelab.steering.report_ways import Texts, other_features, texts_of, ways_of
from saelab.steering.trials import as_texts, check_model
from saelab.steering.ways_measured import Measured
from saelab.validation import check_integer

STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
"""In p99."""
N_NEUTRAL = 8
FEWEST_FOR_PROBE = 8
"""Different texts a side."""


class _Asked(NamedTuple):
    """What is to be measured."""

    lm: LanguageModel
    feature: Any
    prompts: tuple[str, ...]
    strengths: tuple[float, ...]
    seeds: tuple[int, ...]
    given: Texts | None
    neutral: tuple[str, ...]
    ask: str | None


def steering_report(
    lm: LanguageModel,
    feature: Any,
    prompts: Any = PROMPTS,
    *,
    strengths: Sequence[float] = STRENGTHS,
    seeds: Sequence[int] = (0, 1),
    positive: Any = (),
    negative: Any = (),
    neutral: Any = (),
    ask: str | None = None,
    max_new_tokens: int = 30,
    temperature: float = 0.8,
    progress: bool = True,
) -> SteeringReport:
    """Measure `feature` (of a store, or one end of it) at `strengths` in its p99, beside random directions, random features,
    the difference of means and a prompt that asks.

    `positive` and `negative` are texts with and without the concept: the difference of means is then theirs, and with at least
    8 different ones a side a probe says how probable the concept is in what was written. Otherwise the difference is between the
    feature's strongest examples and examples of other features. `neutral` texts (by default examples of other features) tell
    the cost in perplexity. `ask` is put before every prompt to ask for the concept; "" leaves that out. Intervals are bootstrap
    intervals over prompts and seeds.

    Raises `ValueError` for what is no feature of a store, a model that is not the store's or is being steered, prompts that
    are no texts, and texts of one side only; `SaelabError` for a feature without a p99.
    """
    prompts, strengths, seeds = as_texts(prompts), _checked_strengths(strengths), _checked_seeds(seeds)
    neutral = as_texts(neutral, "neutral") if len(neutral) else ()
    of = _Asked(lm, _feature_of(feature, lm), prompts, strengths, seeds, _given(positive, negative), neutral, ask)
    return _reported(of, {"max_new_tokens": max_new_tokens, "temperature": temperature, "seeds": seeds}, progress)


def _reported(of: _Asked, how: dict[str, Any], progress: bool) -> SteeringReport:
    lm, feature, store, index = of.lm, of.feature, of.feature.store, of.feature.feature
    others = other_features(store, index, max(len(of.prompts), N_NEUTRAL), of.seeds[0])
    stored, label = texts_of(feature, others, lm.tokenizer), store.feature(index).label or ""
    ask = (f"The following text is about {label}.\n\n" if label else "") if of.ask is None else of.ask
    ways = ways_of(lm, feature, of.given or stored, others, of.seeds[0])
    probed = _probe(lm, of.given, feature.handle.hook_name)
    measured = Measured(lm, feature, of.prompts, of.neutral or stored.other[:N_NEUTRAL], probed, how)
    rows = []
    with tqdm(total=len(ways) + bool(ask), desc="Report", unit="way", disable=not progress) as bar:
        for name, plan_of in ways.items():
            rows += measured.way(name, plan_of, of.strengths)
            bar.update()
        if ask:
            rows.append(measured.asked(ask))
            bar.update()
    texts = {"prompts": of.prompts, "seeds": of.seeds, "n_neutral": measured.n_neutral, "unsteered": measured.example}
    return SteeringReport(index, label, lm.name, rows=tuple(rows), ask=ask, probe=probed, **texts)


def _feature_of(feature: Any, lm: LanguageModel) -> Any:
    if not hasattr(feature, "store") or not hasattr(feature, "handle"):
        raise ValueError(f"feature={feature!r} is no feature of a store; give store.feature(17).")
    check_model(feature.store, lm)
    return feature


def _given(positive: Any, negative: Any) -> Texts | None:
    """The labelled texts; None without any. Raises `ValueError` for one side alone."""
    if bool(len(positive)) != bool(len(negative)):
        raise ValueError("A concept needs texts with it (positive) and without (negative): give both sides or neither.")
    return Texts(as_texts(positive, "positive"), as_texts(negative, "negative")) if len(positive) else None


def _probe(lm: LanguageModel, texts: Texts | None, hook_name: str) -> Probe | None:
    """A probe of the labelled texts, where there are enough of them."""
    enough = texts is not None and min(len(set(texts.about)), len(set(texts.other))) >= FEWEST_FOR_PROBE
    return probe(lm, texts.about, texts.other, hook_name) if texts is not None and enough else None


def _checked_seeds(seeds: Any) -> tuple[int, ...]:
    found: tuple[Any, ...] = tuple(seeds) if isinstance(seeds, Sequence) and not isinstance(seeds, str) else (seeds,)
    for one in found:
        check_integer("seeds", one, 0, 2**63 - 1)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"seeds={seeds!r}; expected whole numbers, each once, such as (0, 1).")
    return found


def _checked_strengths(strengths: Any) -> tuple[float, ...]:
    found = tuple(float(one) for one in strengths)
    if not found or not all(0 < one < float("inf") for one in found) or len(set(found)) < len(found):
        raise ValueError(f"strengths={strengths!r}; expected positive numbers, each once, such as {STRENGTHS}.")
    return tuple(sorted(found))
