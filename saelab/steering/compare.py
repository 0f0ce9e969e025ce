"""`compare`: steered and unsteered texts side by side, from the same random numbers, with what they show and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from tqdm.auto import tqdm

from saelab.activation_cache.checks import refuse_steered
from saelab.features.token_text import token_bytes
from saelab.models import LanguageModel, Steering
from saelab.models.prompts import several
from saelab.steering.compared import Continuation, FeatureRead
from saelab.steering.comparison import Comparison
from saelab.steering.control import random_control
from saelab.steering.plan import Plan
from saelab.steering.read_features import FIRES_ABOVE, Reader, features_of, p99_of
from saelab.steering.strengths import adds, as_plan, checked_strengths, handle_of, is_feature, scaled

OnStep = Callable[[int, Callable[..., list[Continuation]]], bool | None]
"""(number of new tokens, what makes the texts so far) -> whether to end the texts here; None goes on. `texts(read=True)` also has
the unsteered model and SAE read them, which costs a forward pass."""


class _Arm(NamedTuple):
    strength: float | None
    control: bool
    plan: Plan | None


def compare(
    lm: LanguageModel,
    prompts: Any,
    edits: Any,
    *,
    strengths: float | Sequence[float] | None = None,
    seeds: int | Sequence[int] = 0,
    max_new_tokens: int = 40,
    temperature: float | None = None,
    control: bool = False,
    read: Any = (),
    on_step: OnStep | None = None,
    progress: bool = True,
) -> Comparison:
    """Continue each prompt unsteered and at every strength, all of them in one batch that draws the same random numbers.

    `edits` are features (at 1 p99), edits, or a `Plan`; `strengths` multiply what they add (None: 1, 2 and 4 for features, else
    1), and 0 is the unsteered text. `seeds` is one seed or several; `temperature` None is 0, or 0.8 with several seeds. With
    `control` every strength is also tried with random directions of equal norm. The unsteered model and SAE read every text:
    the log-probability of its tokens, and where the steered features and those of `read` fire. `on_step(n, texts)` is called
    after n new tokens of a prompt; `texts()` are those so far, `texts(read=True)` with numbers. When it returns True they end.

    Raises `ValueError` inside a `steer` block and for what cannot be steered, compared or controlled; otherwise as
    `lm.generate_arms` does.
    """
    refuse_steered(lm)
    plan, given = as_plan(edits), [] if isinstance(edits, Steering) else _listed(edits)
    arms = _arms(plan, checked_strengths(strengths, plan, bool(given) and all(map(is_feature, given))), control)
    handles = [*features_of(plan.edits), *_read_too(read)]
    reader = Reader(lm, list({(id(one.sae), one.feature, one.end): one for one in handles}.values()))
    drawn = _some(_listed(seeds), "seeds")
    temperature = (0.8 if len(drawn) > 1 else 0.0) if temperature is None else temperature
    listed, texts = _some(several(prompts, "prompts"), "prompts"), []
    with tqdm(total=len(listed) * max_new_tokens, unit=" tokens", desc="Writing", disable=not progress) as bar:
        for i, prompt in enumerate(listed):
            writing = _Writing(lm, prompt, i, arms, drawn)
            texts += writing.finished(reader, bar, on_step, max_new_tokens=max_new_tokens, temperature=temperature)
    features = tuple(_feature_read(handle, [*given, *_listed(read)]) for handle, _ in reader.features)
    told = {"max_new_tokens": max_new_tokens, "temperature": float(temperature), "report": lm.last_report}
    return Comparison(plan, tuple(_prompt_text(lm, one) for one in listed), features, tuple(texts), lm.name, **told)


def _some(found: Iterable[Any], name: str) -> list[Any]:
    listed = list(found)
    if not listed:
        raise ValueError(f"{name}=[] asks for no text: give at least one.")
    return listed


def _read_too(read: Any) -> list[Any]:
    if others := [one for one in _listed(read) if not is_feature(one)]:
        raise ValueError(f"read={others[0]!r} is no feature: give features of a store, or handles.")
    return [handle_of(one) for one in _listed(read)]


def _listed(one: Any) -> list[Any]:
    return list(one) if isinstance(one, Sequence) else [one]


def _arms(plan: Plan, strengths: Sequence[float], control: bool) -> list[_Arm]:
    """The unsteered arm, and one for each strength and control; a strength of 0 is the unsteered arm where all edits add."""
    nothing = all(map(adds, plan.edits))
    listed = [strength for strength in strengths if strength != 0 or not nothing]
    if not listed:
        raise ValueError(f"strengths={list(strengths)}: 0 is the unsteered text, which is always there; give others.")
    found = [_Arm(None, False, None), *(_Arm(strength, False, scaled(plan, strength)) for strength in listed)]
    if control:
        found += [_Arm(strength, True, random_control(scaled(plan, strength))) for strength in listed]
    return found


class _Writing:
    """One prompt under every arm and seed."""

    def __init__(self, lm: LanguageModel, prompt: Any, index: int, arms: list[_Arm], seeds: Sequence[int]) -> None:
        self.lm, self.prompt, self.index, self.arms, self.seeds = lm, prompt, index, arms, seeds
        self.special = set(lm.special_ids)
        self.pieces: dict[int, bytes] = {}

    def finished(self, reader: Reader, bar: Any, on_step: OnStep | None, **how: Any) -> list[Continuation]:
        """The texts, generated and read."""
        plans, start = [arm.plan for arm in self.arms], bar.n

        def told(n: int, ids: Tensor, _: Tensor) -> bool | None:
            bar.update(1)
            return None if on_step is None else on_step(n, partial(self._drafts, reader, ids, ids.shape[1] - n))

        found = self.lm.generate_arms(self.prompt, plans, seeds=self.seeds, on_step=told, **how)
        bar.update(start + how["max_new_tokens"] - bar.n)
        every = [one for of_arm in found for one in of_arm]
        return self._read(reader, [one.ids for one in every], every[0].n_prompt)

    def _read(self, reader: Reader, texts: Sequence[Tensor], n_prompt: int) -> list[Continuation]:
        return [
            self._text(i, ids[n_prompt:])._replace(
                log_probs=tuple(read.log_probs.tolist()), values=tuple(map(tuple, read.values.tolist()))
            )
            for i, (ids, read) in enumerate(zip(texts, reader.read(texts, n_prompt), strict=True))
        ]

    def _drafts(self, reader: Reader, ids: Tensor, n_prompt: int, *, read: bool = False) -> list[Continuation]:
        """The texts so far, each up to its end."""
        rows = [row[row >= 0] for row in ids.cpu()]
        if not read:
            return [self._text(i, row[n_prompt:]) for i, row in enumerate(rows)]
        with self.lm.unsteered():
            return self._read(reader, rows, n_prompt)

    def _text(self, i: int, ids: Tensor) -> Continuation:
        arm, seed, new = self.arms[i // len(self.seeds)], self.seeds[i % len(self.seeds)], ids.tolist()
        self.pieces |= token_bytes(self.lm.tokenizer, set(new) - self.pieces.keys())
        pieces = tuple(self.pieces[one] for one in new)
        spoken = b"".join(piece for one, piece in zip(new, pieces, strict=True) if one not in self.special)
        text = spoken.decode("utf-8", "replace")
        return Continuation(self.index, seed, arm.strength, arm.control, text, tuple(new), pieces)


def _prompt_text(lm: LanguageModel, prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    ids = lm.to_ids(prompt).flatten().tolist()
    spelled = token_bytes(lm.tokenizer, ids)
    return b"".join(spelled[one] for one in ids).decode("utf-8", "replace")


def _feature_read(handle: Any, given: Sequence[Any]) -> FeatureRead:
    same = [one for one in given if is_feature(one) and one.feature == handle.feature]
    labels = [getattr(one, "label", None) for one in same if handle_of(one).sae is handle.sae]
    unit = p99_of(handle)
    label = next(filter(None, labels), "")
    return FeatureRead(handle.feature, handle.hook_name, label, 0.0 if unit is None else FIRES_ABOVE, unit is not None)
