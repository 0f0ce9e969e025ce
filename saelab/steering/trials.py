"""Trials: a feature at a strength continues a prompt, and the unsteered model and the SAE read the text.

    read-back = share of the text on which the feature exceeds p99 / 4, minus the same share of the unsteered text
    cost      = nats per token under the unsteered model, minus those of the unsteered text
    score     = read-back * fluency (`fluency.py`)

Steered and unsteered texts of a prompt draw the same random numbers. Several features run as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from saelab.models import LanguageModel
from saelab.models.prompts import several
from saelab.models.sampling import Generation
from saelab.saes.hooks_used import HooksUsed
from saelab.steering.fluency import fluency
from saelab.steering.plan import Plan
from saelab.steering.readback import Read, Reader

ARMS = 24
"""Texts of one batch."""
FIRES = 0.25
"""A feature counts as read back above this share of its p99."""

Choice = tuple[int, float]
"""A feature and its strength, in p99."""


class Trial(NamedTuple):
    """One steered text."""

    feature: int
    strength: float
    """In p99."""
    prompt: int
    """Its number among the prompts."""
    text: str
    """The continuation."""
    ids: tuple[int, ...]
    """Its tokens, without special ones."""
    fires: float
    """Share of them on which the feature exceeds p99 / 4, as the unsteered model reads them."""
    fires_unsteered: float
    nll: float
    """Nats per token under the unsteered model."""
    nll_unsteered: float

    @property
    def read_back(self) -> float:
        return self.fires - self.fires_unsteered

    @property
    def nll_cost(self) -> float:
        return self.nll - self.nll_unsteered

    @property
    def fluency(self) -> float:
        return fluency(self.nll_cost, self.ids, self.text)

    @property
    def score(self) -> float:
        return self.read_back * self.fluency


class Settings(NamedTuple):
    """How texts are generated."""

    prompts: tuple[str, ...]
    max_new_tokens: int = 30
    temperature: float = 0.0
    seed: int = 0


class Trials:
    """Runs trials with the features of a store. Raises `ValueError` for a model of other weights than the store's, prompts that
    are no texts, an SAE of several models, or a model that is being steered."""

    def __init__(self, store: Any, lm: LanguageModel, settings: Settings) -> None:
        check_model(store, lm)
        self.store, self.lm, self.settings = store, lm, settings
        hooks = store.manifest["sites"]
        self.reader = Reader(lm, store.sae, HooksUsed(tuple(hooks["reads"]), tuple(hooks["writes"])))
        self._units: dict[int, float] = {}

    @cached_property
    def unsteered(self) -> list[tuple[str, Read]]:
        """Of each prompt: the unsteered continuation, and how it is read."""
        texts = [self._generate(number, [None])[0] for number in range(len(self.settings.prompts))]
        return [(self._text(text), read) for text, read in zip(texts, self.reader.read(texts), strict=True)]

    def run(self, choices: Sequence[Choice], prompt: int) -> list[Trial]:
        """The trials of these features at one prompt, in one batch. Raises `SaelabError` for a feature without p99."""
        handles = [self.store.feature(feature).handle for feature, _ in choices]
        self._units |= {handle.feature: handle.unit("p99") for handle in handles}
        texts = self._generate(
            prompt, [Plan((handle * strength,)) for handle, (_, strength) in zip(handles, choices, strict=True)]
        )
        read = self.reader.read(texts)
        return [
            self._trial(*choice, prompt, text, seen) for choice, text, seen in zip(choices, texts, read, strict=True)
        ]

    def _trial(self, feature: int, strength: float, prompt: int, text: Generation, read: Read) -> Trial:
        unsteered, bound = self.unsteered[prompt][1], FIRES * self._units[feature]
        return Trial(
            feature,
            strength,
            prompt,
            self._text(text),
            tuple(read.ids.tolist()),
            read.share_above(feature, bound),
            unsteered.share_above(feature, bound),
            read.mean_nll,
            unsteered.mean_nll,
        )

    def _generate(self, prompt: int, arms: Sequence[Plan | None]) -> list[Generation]:
        how = self.settings
        seed = how.seed + prompt  # else a prompt would repeat the luck of another
        found = self.lm.generate_arms(how.prompts[prompt], arms, how.max_new_tokens, how.temperature, seed)
        return [one for (one,) in found]

    def _text(self, text: Generation) -> str:
        tokenizer = self.lm.tokenizer
        full = tokenizer.decode(text.ids, skip_special_tokens=True)
        return full[len(tokenizer.decode(text.ids[: text.n_prompt], skip_special_tokens=True)) :]


def run_trials(
    store: Any,
    lm: LanguageModel,
    choices: Sequence[Choice],
    prompts: Any,
    *,
    max_new_tokens: int = 30,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Trial]:
    """Every (feature, strength) of `choices` on every prompt, such as prompts that were not used to choose them: prompt by
    prompt, in the order of `choices`. Raises as `Trials`."""
    trials = Trials(store, lm, Settings(as_texts(prompts), max_new_tokens, temperature, seed))
    return [
        trial
        for prompt in range(len(trials.settings.prompts))
        for start in range(0, len(choices), ARMS)
        for trial in trials.run(choices[start : start + ARMS], prompt)
    ]


def as_texts(prompts: Any, name: str = "prompts") -> tuple[str, ...]:
    """Prompts, or what `name` says, as texts. Raises `ValueError` for anything else, or none."""
    texts = tuple(several(prompts, name))
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{name}={prompts!r}; expected texts, such as ['I think that'].")
    return texts


def check_model(store: Any, lm: LanguageModel) -> None:
    """Raises `ValueError` for a model of other weights than the store's or without a tokenizer, and for an SAE of several."""
    known = store.manifest["model"]
    if lm.hash != known["hash"]:
        raise ValueError(f"The store was collected with {known['name']}: {lm.name} has other weights.")
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} has no tokenizer to write texts with: use load_model(model, tokenizer).")
    if several_models := [name for name in store.manifest["sites"]["reads"] if "/" in name]:
        raise ValueError(
            f"The SAE reads {several_models[0]}, so several models: their features cannot be tried in one."
        )
