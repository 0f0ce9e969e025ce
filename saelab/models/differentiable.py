"""Activations and logits of a language model with gradients, for what is learned through it: edits, and SAEs in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.models.applying import Block, Pass
from saelab.models.families import in_eval_mode
from saelab.models.hooks import tapped, unknown_hook
from saelab.models.language_model import LanguageModel
from saelab.models.prompts import Batch
from saelab.models.steered import Edit, Steering


def differentiable_activations(
    lm: LanguageModel, batch: Batch, hook_names: Sequence[str], edits: Sequence[Edit] = ()
) -> dict[str, Tensor]:
    """Activations (batch, seq, d_in) at each hook under `edits` alone, in the model's dtype, with gradients towards what the
    edits are computed from; at the hook of an edit, what the edit made of them.

    The pass ends after the last hook. Weights get no gradients, and keep their `requires_grad`. Raises `ValueError` for a
    hook that cannot be edited.
    """
    check_editable(lm, [*hook_names, *(edit.hook_name for edit in edits)])
    lm.backend.prepare(batch.positions)
    captured: dict[str, Tensor] = {}
    with _frozen(lm):
        ids, positions = (x.clone().to(lm.device) for x in batch)  # inference tensors cannot be saved for a gradient
        with tapped(lm.backend.hook_places, _under(edits, lm, ids, positions), hook_names, captured):
            lm.backend.trunk(ids, positions)
        return {name: captured[name].flatten(2) for name in hook_names}


def differentiable_logits(
    lm: LanguageModel, batch: Batch, edits: Sequence[Edit] = ()
) -> Float[Tensor, "batch seq vocab"]:
    """Logits under `edits` alone, with gradients as in `differentiable_activations`."""
    check_editable(lm, [edit.hook_name for edit in edits])
    lm.backend.prepare(batch.positions)
    with _frozen(lm):
        ids, positions = (x.clone().to(lm.device) for x in batch)
        with tapped(lm.backend.hook_places, _under(edits, lm, ids, positions)):
            return lm.backend.logits(ids, positions)
        raise AssertionError("no capture can cut this pass")


def check_editable(lm: LanguageModel, hook_names: Sequence[str]) -> None:
    """Raise `ValueError` for a hook that cannot be edited, naming the nearest that can."""
    for name in hook_names:
        if name not in lm.backend.hook_places:
            raise unknown_hook(name, lm.hook_names, f"the editable hooks of {lm.name}")


def _under(edits: Sequence[Edit], lm: LanguageModel, ids: Tensor, positions: Tensor) -> Pass | None:
    return lm._pass(ids, positions, blocks=[Block(Steering(edits))] if edits else [])


@contextmanager
def _frozen(lm: LanguageModel) -> Iterator[None]:
    """The lock, no dropout, gradients on, none of them for the weights; everything is restored afterwards."""
    with lm._lock, torch.inference_mode(False), torch.enable_grad(), in_eval_mode(lm.model):
        trained: list[Any] = [weight for weight in lm.model.parameters() if weight.requires_grad]
        for weight in trained:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in trained:
                weight.requires_grad_(True)
