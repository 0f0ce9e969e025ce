"""Texts in one forward pass of the unsteered model: the logits, and the activations at hooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.models import LanguageModel


class Pass(NamedTuple):
    """What the model computed for texts that are padded on the right."""

    logits: Float[Tensor, "batch seq vocab"]
    x: dict[str, Float[Tensor, "batch seq d_in"]]
    """Activations by hook."""


class _Recorder:
    """An edit that changes nothing and keeps the activations."""

    def __init__(self, hook_name: str) -> None:
        self.hook_name, self.x = hook_name, torch.empty(0)

    def apply(self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]) -> Tensor:
        self.x = x.clone()  # a later layer may write into the tensor
        return x


def unsteered_pass(lm: LanguageModel, texts: Sequence[Int[Tensor, " n_tokens"]], hook_names: Iterable[str]) -> Pass:
    """Texts of at least two tokens in one batch. Leaves `lm.last_report` as it is. Raises `ValueError` if the model is being
    steered, and for a hook that cannot be edited; else as `lm.logits` does."""
    refuse_steered(lm)
    width = max(map(len, texts))
    ids = torch.stack([torch.cat([text, text.new_zeros(width - len(text))]) for text in texts])
    counted = torch.arange(width).expand(len(texts), -1)
    positions = torch.where(counted < torch.tensor([len(text) for text in texts])[:, None], counted, -1)
    recorders, reported = [_Recorder(name) for name in dict.fromkeys(hook_names)], lm.last_report
    try:
        named = tuple(range(1, width)) if recorders else None  # so that special tokens are read too
        with lm.steer(*recorders, positions=named):
            logits = lm.logits(ids, positions=positions)
    finally:
        lm.last_report = reported  # the recorders are edits too, which no user asked for
    return Pass(logits, {one.hook_name: one.x for one in recorders})


def refuse_steered(lm: LanguageModel) -> None:
    """Raises `ValueError` if the model is being steered."""
    if lm.edits:
        raise ValueError(
            f"The model is being steered by {lm.edits[0]!r}, but the unsteered model is to read: call this outside of "
            "`with lm.steer(...)`."
        )
