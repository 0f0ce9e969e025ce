"""Who says how good a steered text is: a language model that is asked, here or at an address, or what can be measured.

Three marks from 0 to 2, as in AxBench (Wu et al. 2025, arXiv 2501.17148): does the text show the concept, does it do what the
prompt asked, is it fluent? An item's score is their harmonic mean, 0 if any of them is 0.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from saelab.errors import SaelabError
from saelab.steering.found import WORKS

_LOG = logging.getLogger("saelab")
BEST = 2.0
_TASK = "You mark a text that a language model wrote. Answer with one number alone: 0, 1 or 2."
_QUESTIONS = {
    "concept": "How far is the text about this concept: {concept}? 0: not at all, 1: somewhat, 2: clearly.",
    "instruction": "How far does the text follow from the prompt? 0: not at all, 1: partly, 2: well.",
    "fluency": "How fluent is the text? 0: it cannot be read, 1: it reads badly or repeats itself, 2: it reads well.",
}


class Marks(NamedTuple):
    """Marks from 0 to 2; None where nobody can say."""

    concept: float
    instruction: float | None
    fluency: float

    @property
    def score(self) -> float:
        """Their harmonic mean; 0 if any is 0."""
        given = [mark for mark in self if mark is not None]
        return 0.0 if min(given) <= 0 else len(given) / sum(1 / mark for mark in given)


class Measured(NamedTuple):
    """What is known of a text without asking anybody."""

    read_back: float | None
    """Share of the text on which the concept's feature is read back, above the unsteered text; None without a feature."""
    fluency: float
    """From 0 to 1."""


@runtime_checkable
class Judge(Protocol):
    """Marks texts. `name` stands in the results."""

    @property
    def name(self) -> str: ...
    def marks(self, concept: str, prompt: str, text: str, measured: Measured) -> Marks | None:
        """The marks of one text; None where it gives none. Raises `SaelabError` where it cannot judge at all."""
        ...


@dataclass(frozen=True)
class NoJudge:
    """Marks by measurement: full marks for the concept where the feature is read back on 20 % more of the text, and for fluency
    where the text costs little and does not loop. Nobody says whether the instruction was followed."""

    name: str = "none (read-back and fluency)"

    def marks(self, concept: str, prompt: str, text: str, measured: Measured) -> Marks:
        if measured.read_back is None:
            raise SaelabError(
                f"Without a judge the concept {concept!r} needs a feature to be read back: give read=feature, or a judge."
            )
        return Marks(BEST * min(max(measured.read_back / WORKS, 0.0), 1.0), None, BEST * measured.fluency)


@dataclass(frozen=True)
class ModelJudge:
    """Asks a language model three questions for each text: `ModelJudge(saelab.labels.LocalModel(lm))`, or any address of
    OpenAI's protocol, `ModelJudge(saelab.labels.Endpoint("http://127.0.0.1:8000/v1", "a-model"))`."""

    model: Any
    """Has `name` and `ask(messages, max_tokens)`."""

    @property
    def name(self) -> str:
        return str(self.model.name)

    def marks(self, concept: str, prompt: str, text: str, measured: Measured) -> Marks | None:
        """None where an answer holds no mark. Raises `SaelabError` where there is no answer."""
        found: dict[str, float] = {}
        for name, question in _QUESTIONS.items():
            shown = f"{question.format(concept=concept)}\n\nPrompt: {prompt}\n\nText: {text}"
            answer = self.model.ask([{"role": "system", "content": _TASK}, {"role": "user", "content": shown}], 8)
            mark = mark_in(answer)
            if mark is None:
                _LOG.warning("%s was asked for a mark of 0, 1 or 2 and answered %r.", self.name, answer[:80])
                return None
            found[name] = mark
        return Marks(**found)


def mark_in(answer: str) -> float | None:
    """The mark that an answer begins or ends with; None where it has none, or several that differ."""
    found: Sequence[str] = re.findall(r"(?<![\d.])[0-2](?![\d]|\.\d)", answer)
    return float(found[0]) if len(set(found)) == 1 else None
