"""The gradient of a language model's next-token loss with respect to its activations at hooks.

The loss is the cross-entropy in nats summed over the tokens of a context that another token follows. It is summed rather than
averaged, so that the gradient at a token is independent of the length of its context; it includes the effect on all later tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from saelab.models.applying import Pass
from saelab.models.differentiable import frozen
from saelab.models.hooks import tapped, unknown_hook
from saelab.models.language_model import LanguageModel
from saelab.models.multi_model import locate

MAX_LOGITS = 1 << 25
"""Logits of one forward pass at most, unless one context has more: 128 MiB in float32, of which several copies are needed."""


class WithGradients(NamedTuple):
    """Activations and gradients by hook, each (batch, seq, d_in) in the model's dtype."""

    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]


def check_gradient_hooks(lm: LanguageModel, hook_names: Sequence[str]) -> None:
    """Raise `ValueError` for a hook where activations can be read but not replaced: no gradient is taken there."""
    for name in hook_names:
        if name not in lm.hook_names:
            raise unknown_hook(name, lm.hook_names, f"the hooks of {lm.name} where gradients can be taken")


def activations_and_gradients(
    lm: LanguageModel,
    ids: Int[Tensor, "batch seq"],
    hook_names: Sequence[str],
    real: Bool[Tensor, "batch seq"] | None = None,
) -> WithGradients:
    """Activations of the unedited model at each hook, and the gradients of the loss of `ids` with respect to them.

    `real` is False on padding, which must be on the right. Of several models each has its own loss. Contexts are run a few at
    a time (`MAX_LOGITS`). Raises `ValueError` for a hook that cannot be edited.
    """
    check_gradient_hooks(lm, hook_names)
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    by_model: dict[LanguageModel, dict[str, str]] = {}
    for name in hook_names:
        model, hook = locate(lm, name)
        by_model.setdefault(model, {})[hook] = name
    found = WithGradients({}, {})
    for model, names in by_model.items():
        for ours, theirs in zip(found, _of_one(model, ids, list(names), real), strict=True):
            ours.update({names[hook]: x.to(lm.device) for hook, x in theirs.items()})
    return WithGradients(*({name: of[name] for name in hook_names} for of in found))


def _of_one(lm: LanguageModel, ids: Tensor, hooks: list[str], real: Tensor) -> WithGradients:
    """Contexts do not affect each other, so they are run a few at a time."""
    n = max(1, MAX_LOGITS // (ids.shape[1] * lm.d_vocab))
    parts = [_of_part(lm, *part, hooks) for part in zip(ids.split(n), real.split(n), strict=True)]
    return WithGradients(
        *({name: torch.cat([one[name] for one in of]) for name in hooks} for of in zip(*parts, strict=True))
    )


def _of_part(lm: LanguageModel, ids: Tensor, real: Tensor, hooks: list[str]) -> WithGradients:
    with frozen(lm):
        ids, real = ids.clone().to(lm.device), real.to(lm.device)  # inference tensors cannot be saved for a gradient
        seen = _Seen(hooks)
        with tapped(lm.backend.hook_places, seen):
            logits = lm.backend.logits(ids)
            gradients = torch.autograd.grad(
                _loss(logits, ids, real), [seen.captured[hook] for hook in hooks], materialize_grads=True
            )
    activations = {hook: seen.captured[hook].detach().flatten(2) for hook in hooks}
    return WithGradients(activations, {hook: g.flatten(2) for hook, g in zip(hooks, gradients, strict=True)})


def _loss(logits: Float[Tensor, "n seq vocab"], ids: Int[Tensor, "n seq"], real: Bool[Tensor, "n seq"]) -> Tensor:
    targets = ids[:, 1:].long().masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return cross_entropy(wide, targets.flatten(), ignore_index=-100, reduction="sum")


class _Seen(Pass):
    """Edits that change nothing: the model goes on with a copy of what is captured, so that the gradient is that of what
    follows the hook, and the graph begins at the first one."""

    def __init__(self, hooks: Sequence[str]) -> None:
        super().__init__([], None, {})
        self._hooks = dict.fromkeys(hooks)
        self.captured: dict[str, Tensor] = {}

    @property
    def hook_names(self) -> dict[str, None]:
        return self._hooks

    def at(self, hook_name: str) -> Callable[[Tensor], Tensor]:
        def copied(x: Tensor) -> Tensor:
            self.captured[hook_name] = here = (x if x.requires_grad else x.detach().requires_grad_()).clone()
            return here.clone()  # a model may go on to change it in place

        return copied
