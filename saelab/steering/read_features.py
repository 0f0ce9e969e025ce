"""Texts as the unsteered model and SAE read them: the log-probability of every new token, and where features fire on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.edits.direction import VectorEdit
from saelab.edits.feature_edit import FeatureEdit
from saelab.edits.feature_handle import FeatureHandle
from saelab.errors import SaelabError
from saelab.evaluation.loss_recovered import MAX_LOGITS
from saelab.models import LanguageModel
from saelab.saes.hooks_used import HooksUsed
from saelab.saes.trained_hooks import hooks_of
from saelab.steering.unsteered import unsteered_pass

FIRES_ABOVE = 0.25
"""A feature counts as read back on a token where it exceeds this many p99."""


class Read(NamedTuple):
    """The new tokens of one text."""

    log_probs: Float[Tensor, " n_new"]
    """Of each token, in nats, under the unsteered model."""
    values: Float[Tensor, "n_features n_new"]
    """Feature activations in p99 (magnitudes in the SAE's own units for a feature without a p99), towards the steered end."""


class Reader:
    """Reads texts with the unsteered model, and features in the same pass."""

    def __init__(self, lm: LanguageModel, features: Sequence[FeatureHandle]) -> None:
        self.lm = lm
        found = [(handle, _hooks(handle, lm)) for handle in features]
        self.features = [(handle, hooks) for handle, hooks in found if hooks is not None]

    @torch.no_grad()
    def read(self, texts: Sequence[Int[Tensor, " n_tokens"]], n_prompt: int) -> list[Read]:
        """Each text behind its first `n_prompt` tokens."""
        return [one for batch in self._batches(texts) for one in self._read(batch, n_prompt)]

    def _batches(self, texts: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """As many texts at once as a forward pass may hold logits of."""
        size = max(1, MAX_LOGITS // (max(map(len, texts)) * self.lm.d_vocab))
        return (texts[first : first + size] for first in range(0, len(texts), size))

    def _read(self, texts: Sequence[Tensor], n_prompt: int) -> list[Read]:
        found = unsteered_pass(self.lm, texts, [name for _, hooks in self.features for name in hooks.all])
        x = {name: rows[:, n_prompt:] for name, rows in found.x.items()}
        values = self._values(x, (len(texts), max(map(len, texts)) - n_prompt))
        result = []
        for i, one in enumerate(texts):
            log_probs = found.logits[i, n_prompt - 1 : len(one) - 1].float().log_softmax(-1).cpu()
            chosen = log_probs.gather(1, one[n_prompt:, None]).squeeze(1)
            result.append(Read(chosen, values[:, i, : len(one) - n_prompt]))
        return result

    def _values(self, x: dict[str, Tensor], shape: tuple[int, int]) -> Float[Tensor, "n_features batch n_new"]:
        encoded: dict[int, Any] = {}
        columns = []
        for handle, hooks in self.features:
            rows = hooks.batch(x).x
            if id(handle.sae) not in encoded:
                flat = rows.flatten(0, 1).float().to(handle.sae.W_enc.device)
                encoded[id(handle.sae)] = handle.sae.encode(flat)
            unit = p99_of(handle)
            z = encoded[id(handle.sae)].column(handle.feature).float().cpu()
            columns.append((z.abs() if unit is None else z / unit).view(shape))
        return torch.stack(columns) if columns else torch.zeros(0, *shape)


def p99_of(handle: FeatureHandle) -> float | None:
    """The p99 in which values are told; None without any."""
    try:
        return handle.unit("p99")
    except SaelabError:
        return None


def features_of(edits: Sequence[Any]) -> list[FeatureHandle]:
    """The features that edits change, each once."""
    found: dict[Any, FeatureHandle] = {}
    for edit in edits:
        if isinstance(edit, FeatureEdit):
            sae, feature, units = edit.sae, edit.feature, edit.units
        elif isinstance(edit, VectorEdit) and edit.asked:
            sae, feature, units = edit.asked["sae"], edit.asked["feature"], {}
        else:
            continue
        handle = FeatureHandle(sae, feature, edit.hook_name, units, end=edit.asked.get("end", 0))
        found.setdefault((id(sae), feature, handle.end), handle)
    return list(found.values())


def _hooks(handle: FeatureHandle, lm: LanguageModel) -> HooksUsed | None:
    """The hooks that the feature is read at; None where this model has them not, or the SAE is a part of another."""
    if handle.sae.provenance.origin.get("partial"):
        return None
    try:
        inputs = hooks_of(handle.sae).inputs
    except ValueError:
        inputs = (handle.hook_name,)
    return HooksUsed(inputs, inputs) if set(inputs) <= set(lm.hook_names) else None
