"""Several language models read side by side on the same tokens, with the interface of one: for crosscoders over models.

A hook is named "LABEL/HOOK"; a label is the last part of a model's name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

from jaxtyping import Int
from torch import Tensor

from saelab.models.hooks import hook_list
from saelab.models.language_model import LanguageModel


class ModelsTogether(LanguageModel):
    """Reads activations of all its models; made by `together`. For anything else, `locate` returns the single model."""

    def __init__(self, models: Sequence[LanguageModel]):
        first = models[0]
        self.models = dict(zip(_labels(models), models, strict=True))
        self.name = " + ".join(self.models)
        self.tokenizer, self.model, self.device = first.tokenizer, first.model, first.device
        self.max_ctx = min(lm.max_ctx for lm in models)
        dtypes = {lm.dtype for lm in models}
        self.dtype: Any = first.dtype if len(dtypes) == 1 else " + ".join(str(lm.dtype) for lm in models)

    def __repr__(self) -> str:
        return f"ModelsTogether({', '.join(map(repr, self.models.values()))})"

    @property
    def hash(self) -> str:
        return hashlib.sha256("".join(lm.hash for lm in self.models.values()).encode()).hexdigest()

    @property
    def config_hash(self) -> str:
        return hashlib.sha256("".join(lm.config_hash for lm in self.models.values()).encode()).hexdigest()

    @property
    def logits_probe(self) -> list[float]:
        return [value for lm in self.models.values() for value in lm.logits_probe]

    @property
    def hook_names(self) -> list[str]:
        return [f"{label}/{hook}" for label, lm in self.models.items() for hook in lm.hook_names]

    @property
    def edits(self) -> tuple[Any, ...]:
        return tuple(edit for lm in self.models.values() for edit in lm.edits)

    def locate(self, hook_name: str) -> tuple[LanguageModel, str]:
        """The model of a hook, and the hook's name there. Raises `ValueError` for an unknown label."""
        label, _, hook = hook_name.partition("/")
        if label not in self.models or not hook:
            known = " or ".join(f"{label}/HOOK" for label in self.models)
            raise ValueError(f"hook_name={hook_name!r} names none of these models: write {known}.")
        return self.models[label], hook

    def check_hook(self, hook_name: str) -> None:
        lm, hook = self.locate(hook_name)
        lm.check_hook(hook)

    def d_in(self, hook_name: str) -> int:
        lm, hook = self.locate(hook_name)
        return lm.d_in(hook)

    def stream_activations(
        self, batches: Iterable[Int[Tensor, "_ _"]], hook_names: Sequence[str]
    ) -> Iterator[dict[str, Tensor]]:
        """As for one model; each batch runs through every model that has one of the hooks."""
        wanted: dict[str, list[str]] = {}
        for name in hook_list(hook_names):
            self.check_hook(name)
            label, _, hook = name.partition("/")
            wanted.setdefault(label, []).append(hook)
        return (self._read(ids, wanted) for ids in batches)

    def _read(self, ids: Tensor, wanted: dict[str, list[str]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for label, hooks in wanted.items():
            activations = next(iter(self.models[label].stream_activations([ids], hooks)))
            found |= {f"{label}/{hook}": x.to(self.device) for hook, x in activations.items()}
        return found

    def to_ids(self, prompt: Any) -> Int[Tensor, "batch seq"]:
        """As for one model: all have the same tokenizer."""
        return next(iter(self.models.values())).to_ids(prompt)

    def _only_one(self, *_: Any, **__: Any) -> Any:
        """Raises `ValueError`: several models cannot do that as one."""
        raise ValueError(f"{self.name} are separate models: steer, run and generate with one of them.")

    steer = logits = generate = generate_ids = run_with_edit = _only_one  # pyright: ignore[reportAssignmentType]
    to_batch = chat = logit_weights = _only_one  # pyright: ignore[reportAssignmentType]


def together(lm: LanguageModel | Sequence[LanguageModel]) -> LanguageModel:
    """A single model unchanged, several as a `ModelsTogether`. Raises `ValueError` unless they have the same tokenizer."""
    if isinstance(lm, LanguageModel):
        return lm
    models = list(lm)
    if not models or not all(isinstance(one, LanguageModel) for one in models):
        raise ValueError(f"lm={lm!r}: give a language model from saelab.load_model, or a list of them.")
    if len(models) == 1:
        return models[0]
    tokenizers = [(one.tokenizer_hash, tuple(one.special_ids), one.eos_id) for one in models]
    if len(set(tokenizers)) > 1:
        hashes = ", ".join(f"{one.name} {one.tokenizer_hash[:12]}" for one in models)
        raise ValueError(
            f"Models read side by side need the same tokenizer, so that their rows are the same tokens; these differ: {hashes}."
        )
    return ModelsTogether(models)


def hook_keys(lm: LanguageModel, hook_names: Any) -> list[Any]:
    """A list of hook names as the model spells them: with several models, a plain hook means that hook of each."""
    listed = not isinstance(hook_names, str) and isinstance(hook_names, Sequence)
    hooks: list[Any] = list(hook_names) if listed else [hook_names]
    if not isinstance(lm, ModelsTogether):
        return hooks
    plain = [hook for hook in hooks if not isinstance(hook, str) or "/" not in hook]
    named = [hook for hook in hooks if hook not in plain]
    return named + [f"{label}/{hook}" for label in lm.models for hook in plain]


def locate(lm: LanguageModel, hook_name: str) -> tuple[LanguageModel, str]:
    """The model that has this hook, and the hook's name there."""
    return lm.locate(hook_name) if isinstance(lm, ModelsTogether) else (lm, hook_name)


def names_and_hashes(lm: LanguageModel) -> dict[str, dict[str, str]]:
    """Name and hash of each of several models, by label; {} for one model."""
    models = lm.models if isinstance(lm, ModelsTogether) else {}
    return {label: {"name": one.name, "hash": one.hash} for label, one in models.items()}


def _labels(models: Sequence[LanguageModel]) -> list[str]:
    """Distinct labels that are safe in file names."""
    labels: list[str] = []
    for lm in models:
        word = re.sub(r"[^\w.-]", "_", PurePath(lm.name).name).lstrip(".") or "model"
        same = sum(label == word or label.startswith(f"{word}--") for label in labels)
        labels.append(f"{word}--{same + 1}" if same else word)
    return labels
