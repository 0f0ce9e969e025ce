"""`concept_bench`: concepts, prompts and factors in, one line for each concept and method out, after AxBench's steering task
(Wu et al. 2025, "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders", arXiv 2501.17148).

Each method steers at every factor. On half of the prompts the factor with the best mean score is chosen; the other half says how
good it is. Asking for the concept in the prompt is always among the methods, as it usually wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from saelab.errors import SaelabError
from saelab.files import locked
from saelab.models import LanguageModel
from saelab.steering.bootstrap import mean_interval
from saelab.steering.concept_table import BenchRow, ConceptBench, Item
from saelab.steering.fluency import fluency
from saelab.steering.judges import Judge, Measured, NoJudge
from saelab.steering.plan import Plan
from saelab.steering.read_features import FIRES_ABOVE, Reader
from saelab.steering.strengths import as_plan, checked_strengths, handle_of, is_feature, scaled
from saelab.steering.trial_file import TrialFile
from saelab.steering.trials import as_texts
from saelab.steering.unsteered import refuse_steered
from saelab.validation import check_integer

ASKED = "prompt"
"""The method that asks for the concept."""
FACTORS = (0.5, 1.0, 1.5, 2.0, 3.0)
_VERSION = 1


class Concept(NamedTuple):
    """A concept and what steers towards it."""

    name: str
    """In words, as a judge is asked about it."""
    methods: Mapping[str, Any]
    """Features, directions, edits or plans, by the name of the method; factors multiply what they add."""
    read: Any = None
    """The feature by which it is read back without a judge; by default the first feature among the methods."""


def concept_bench(
    lm: LanguageModel,
    concepts: Sequence[Concept],
    prompts: Any,
    factors: Sequence[float] = FACTORS,
    *,
    judge: Judge | None = None,
    ask: str = "Write about {concept}. ",
    chat: bool = False,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> ConceptBench:
    """Steer towards every concept by each of its methods, and by the prompt that asks (`ask` before every prompt; "" leaves it
    out). `judge` marks the texts (None: read-back and fluency, `judges.py`); with `chat` prompts are a user's messages.

    With `folder`, finished texts and marks are kept there, and the same call goes on where it was interrupted. Raises
    `ValueError` for fewer than 2 prompts, no or equal concepts, what cannot be steered with, or a model that is being steered;
    `SaelabError` where the judge gives no mark.
    """
    refuse_steered(lm)
    check_integer("max_new_tokens", max_new_tokens, 1)
    prompts = as_texts(prompts)
    if len(prompts) < 2:
        raise ValueError(
            f"prompts={list(prompts)}: give at least 2, as one half chooses the factor and the other one is scored."
        )
    plans = _checked(concepts, factors)
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    bench = _Bench(lm, prompts, tuple(map(float, factors)), judge or NoJudge(), ask, chat, how)
    with _kept(folder, bench, concepts, plans) as kept:
        rows = bench.rows(concepts, plans, kept, progress)
    return ConceptBench(tuple(rows), bench.judge.name, prompts, lm.name)


@contextmanager
def _kept(folder: Any, bench: _Bench, concepts: Sequence[Concept], plans: Any) -> Iterator[TrialFile | None]:
    """The file of what was finished, for this process alone; None without a folder."""
    if folder is None:
        yield None
        return
    with locked(Path(folder), f"Another process is benching in {folder}: wait until it is done."):
        yield TrialFile(Path(folder), bench.identity(concepts, plans), "bench")


def _checked(concepts: Sequence[Concept], factors: Sequence[float]) -> list[dict[str, Plan]]:
    """The plans of each concept by method. Raises `ValueError`."""
    names = [concept.name for concept in concepts]
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"concepts={names}; expected at least one Concept, each with a name of its own.")
    if not factors or not all(math.isfinite(one) for one in factors) or len(set(factors)) < len(factors):
        raise ValueError(f"factors={list(factors)}; expected numbers, each once, such as {FACTORS}.")
    plans = []
    for concept in concepts:
        if not concept.methods or ASKED in concept.methods:
            raise ValueError(
                f"concept {concept.name!r} needs methods, none of them named {ASKED!r}, which is always there."
            )
        plans.append({method: as_plan(one) for method, one in concept.methods.items()})
        for plan in plans[-1].values():
            checked_strengths(list(factors), plan, all_features=False)
    return plans


class _Bench:
    """What all concepts and methods share."""

    def __init__(
        self,
        lm: LanguageModel,
        prompts: tuple[str, ...],
        factors: tuple[float, ...],
        judge: Judge,
        ask: str,
        chat: bool,
        how: Any,
    ) -> None:
        self.lm, self.prompts, self.factors, self.judge, self.ask, self.chat, self.how = (
            lm, prompts, factors, judge, ask, chat, how,
        )  # fmt: skip

    def identity(self, concepts: Sequence[Concept], plans: Sequence[Mapping[str, Plan]]) -> dict[str, Any]:
        """What makes two benches the same."""
        told = [
            {
                "name": concept.name,
                "methods": {name: plan.to_json() for name, plan in of.items()},
                "read": _told(_read_of(concept)),
            }
            for concept, of in zip(concepts, plans, strict=True)
        ]
        named = {
            "model": self.lm.hash,
            "dtype": str(self.lm.dtype),
            "judge": self.judge.name,
            "ask": self.ask,
            "chat": self.chat,
        }
        settings = {"prompts": list(self.prompts), "factors": list(self.factors), "concepts": told}
        return {"saelab_concept_bench": _VERSION, **named, **settings, **self.how}

    def rows(
        self, concepts: Sequence[Concept], plans: Sequence[Mapping[str, Plan]], kept: TrialFile | None, progress: bool
    ) -> list[BenchRow]:
        """The lines of all concepts and methods."""
        pairs = [
            (concept, of, [*of, *([ASKED] if self.ask else [])]) for concept, of in zip(concepts, plans, strict=True)
        ]
        with tqdm(
            total=sum(len(methods) for *_, methods in pairs), desc="Bench", unit="method", disable=not progress
        ) as bar:
            rows = []
            for concept, of, methods in pairs:
                for method in methods:
                    rows.append(self.row(concept, method, of.get(method), kept))
                    bar.update()
        return rows

    def row(self, concept: Concept, method: str, plan: Plan | None, kept: TrialFile | None) -> BenchRow:
        """The line of one method."""
        factors = self.factors if plan is not None else (None,)
        items: list[Item] = []
        for n in range(len(self.prompts)):
            key = f"{concept.name} / {method} / {n}"
            if kept is not None and key in kept.batches:
                found = [Item(*one) for one in kept.batches[key]]
            else:
                found = self._items(concept, plan, factors, n)
                if kept is not None:
                    kept.add(key, found)
            items += found
        return self._scored(concept, method, factors, items)

    def _scored(self, concept: Concept, method: str, factors: Sequence[Any], items: Sequence[Item]) -> BenchRow:
        marked = [one for one in items if one.score is not None]
        chosen = max(factors, key=lambda factor: _mean_score(marked, factor))
        held = [one for one in marked if one.factor == chosen and one.prompt % 2 == 1]
        if not held:
            raise SaelabError(
                f"{self.judge.name} gave no marks to the texts of {concept.name!r} by {method!r}: choose a judge that answers "
                "with a number, or give more prompts."
            )
        names = ("concept", "instruction", "fluency", "nll_cost")
        means = {name: _mean([getattr(one, name) for one in held]) for name in names}
        score = mean_interval([one.score for one in held if one.score is not None])
        n_unmarked = len(items) - len(marked)
        return BenchRow(concept.name, method, chosen, score, n_unmarked, **means, items=tuple(items))

    def _items(self, concept: Concept, plan: Plan | None, factors: Sequence[Any], n: int) -> list[Item]:
        """The texts of one prompt at every factor, with their marks."""
        plain, asking = self._prompt(self.prompts[n], ""), self.ask.replace("{concept}", concept.name)
        arms = [None] if plan is None else [scaled(plan, factor) for factor in factors]
        how = {**self.how, "seed": self.how["seed"] + n}
        (base,), *_ = self.lm.generate_arms(plain, [None], **how)
        every = self.lm.generate_arms(self._prompt(self.prompts[n], asking if plan is None else ""), arms, **how)
        before, new = self.lm.to_ids(plain).flatten(), [one.ids[one.n_prompt :] for (one,) in every]
        read = _read_of(concept)
        reader = Reader(self.lm, [] if read is None else [read])
        base_read, *found = reader.read(
            [torch.cat([before, ids]) for ids in (base.ids[base.n_prompt :], *new)], len(before)
        )
        items = []
        for factor, ids, one in zip(factors, new, found, strict=True):
            text, cost = (
                self.lm.tokenizer.decode(ids, skip_special_tokens=True),
                float(base_read.log_probs.mean() - one.log_probs.mean()),
            )
            rise = None if read is None else _fires(one) - _fires(base_read)
            marks = self.judge.marks(
                concept.name, self.prompts[n], text, Measured(rise, fluency(cost, ids.tolist(), text))
            )
            given = (None, None, None) if marks is None else marks
            items.append(Item(factor, n, text, *given, score=marks and marks.score, nll_cost=cost))
        return items

    def _prompt(self, prompt: str, before: str) -> str:
        return self.lm.chat(before + prompt) if self.chat else before + prompt


def _read_of(concept: Concept) -> Any:
    """The handle of the feature by which a concept is read back; None without any."""
    chosen = concept.read if concept.read is not None else next(filter(is_feature, concept.methods.values()), None)
    if chosen is not None and not is_feature(chosen):
        raise ValueError(f"concept {concept.name!r}: read={chosen!r} is no feature; give store.feature(17).")
    return None if chosen is None else handle_of(chosen)


def _told(handle: Any) -> Any:
    return None if handle is None else [handle.sae.hash, handle.feature, handle.end, handle.units]


def _fires(read: Any) -> float:
    return float((read.values[0] > FIRES_ABOVE).float().mean())


def _mean_score(marked: Sequence[Item], factor: Any) -> float:
    """Over the prompts that choose the factor; below any score where nothing was marked."""
    scores = [one.score for one in marked if one.factor == factor and one.prompt % 2 == 0 and one.score is not None]
    return fmean(scores) if scores else -1.0


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return fmean(given) if given else None
