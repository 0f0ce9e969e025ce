"""The questions: for a label, and whether texts or marked tokens fit it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from saelab.features.records import Example
from saelab.features.render import around_peak
from saelab.features.token_text import display_groups

VERSION = 1
"""Part of what makes a label the same: labels by other questions are asked for again."""
LEFT, RIGHT = 24, 10
_EXPLAIN = (
    "You are shown pieces of text. In each, <<double angle brackets>> mark the tokens on which one hidden feature of a language "
    "model fires. Say what these have in common, in a phrase of at most ten words, no sentence. Answer with the phrase alone."
)
_DETECT = (
    "A feature of a language model is described as: {label}\nBelow are numbered pieces of text. In which of them does the "
    "feature fire, on any token? Answer with a JSON list of their numbers alone, such as [1, 4]; [] for none."
)
_FUZZ = (
    "A feature of a language model is described as: {label}\nBelow are numbered pieces of text with <<marked>> tokens. In "
    "which of them do the marks fit the description? Answer with a JSON list of their numbers alone, such as [1, 4]; [] for none."
)


def explain(examples: Sequence[Example]) -> list[dict[str, str]]:
    """The question for a label."""
    return _asked(_EXPLAIN, [marked(example) for example in examples])


def detect(label: str, texts: Sequence[str]) -> list[dict[str, str]]:
    """The question in which texts the feature fires."""
    return _asked(_DETECT.format(label=label), texts)


def fuzz(label: str, texts: Sequence[str]) -> list[dict[str, str]]:
    """The question in which texts the right tokens are marked."""
    return _asked(_FUZZ.format(label=label), texts)


def _asked(task: str, texts: Sequence[str]) -> list[dict[str, str]]:
    numbered = "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))
    return [{"role": "system", "content": task}, {"role": "user", "content": numbered}]


def plain(example: Example) -> str:
    """The text around the peak in one line."""
    return _one_line("".join(around_peak(example, LEFT, RIGHT)))


def marked(example: Example, at: int | None = None) -> str:
    """The same with the tokens marked on which the feature fires, or only token `at`."""
    pieces = []
    for group in display_groups(example.pieces):
        if group.stop <= example.peak - LEFT or group.start > example.peak + RIGHT:
            continue
        fires = any(example.values[group.start : group.stop]) if at is None else group.start <= at < group.stop
        pieces.append(f"<<{group.text}>>" if fires else group.text)
    return _one_line("".join(pieces).replace(">><<", ""))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def numbers(answer: str, n: int) -> set[int] | None:
    """The chosen numbers, from 0; None for an answer without a list of numbers from 1 to n."""
    for found in re.findall(r"\[[\d,\s]*\]", answer):
        chosen = json.loads(re.sub(r",\s*\]", "]", found)) if found.strip("[] \n") else []
        if all(1 <= number <= n for number in chosen):
            return {number - 1 for number in chosen}
    return None


def phrase(answer: str, longest: int = 120) -> str | None:
    """The first line of an answer as a label; None if there is nothing in it, or markup."""
    line = next((one.strip(" \t\"'`*.") for one in answer.splitlines() if one.strip()), "")
    return line[:longest] if line and not line.startswith(("<", "{", "[")) else None
