"""Maps that make the activations of some texts distributed as those of others, learned through the model (LinEAS):

    x' = w * x + b   at every hook,     loss = sum over hooks and coordinates of W2^2(source under all maps, target)

by proximal gradient descent on the means over each text's tokens. After Rodriguez et al. 2025, "LinEAS: End-to-end Learning of
Activation Steering with a Distributional Loss" (arXiv 2503.10679).

The paper's hooks are outputs of layer norms, where all coordinates have about one size. Here every coordinate is measured in
its standard deviation over the source texts, from their mean, in the loss, the steps and the penalty: one learning rate then
serves every hook.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from saelab.edits.direction import finite
from saelab.errors import SaelabError
from saelab.models import LanguageModel
from saelab.models.differentiable import differentiable_activations
from saelab.models.hooks import hook_list, unknown_hook
from saelab.steering.affine_maps import AffineEdit, LinEAS
from saelab.steering.text_activations import counted_tokens, text_list, text_vectors
from saelab.steering.transport import shrink, transport_cost
from saelab.steering.unsteered import refuse_steered
from saelab.validation import check_integer

_FLOOR = 0.1
"""A coordinate's standard deviation counts as at least this share of the root mean square over the coordinates of its hook."""

_FAR_ABOVE, _REGROWTH, _NOISE = 1.5, 1.1, 1e-3
"""A step is undone when the loss rises to so many times the smallest; a step that was shortened grows back by so much; a loss
below counts as zero."""


@dataclass(frozen=True)
class _Settings:
    steps: int
    lr: float
    gamma: float
    lasso: float
    group: float
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for name, minimum in (("steps", 0), ("batch_size", 2), ("seed", 0)):
            check_integer(name, getattr(self, name), minimum)
        for name in ("lr", "gamma", "lasso", "group"):
            number = finite(getattr(self, name), name)
            if number < 0:
                raise ValueError(f"{name}={number:g} must be at least 0.")
            object.__setattr__(self, name, number)


def lineas(
    lm: LanguageModel,
    source: Any,
    target: Any,
    hook_names: str | Sequence[str],
    *,
    steps: int = 1000,
    lr: float = 0.1,
    gamma: float = 0.0,
    lasso: float = 1.0,
    group: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> LinEAS:
    """Learn maps at `hook_names` under which the `source` texts have activations distributed as those of `target`.

    The texts need no pairs, and may differ in number (the paper: 32 a side). `lr` falls to 0 along a cosine; `gamma` weighs a
    sparse group lasso, of which `lasso` and `group` weigh the two terms, and leaves coordinates unchanged if it is not 0. Each
    step reads `batch_size` texts a side, drawn with `seed` where there are more. Memory grows with them and with the layers
    between the first and the last hook. The model is left as it was, also by an exception.

    Raises `ValueError` for fewer than two texts a side, texts without a counted token, a hook that cannot be edited, a model
    that is being steered, and numbers out of range; `SaelabError` if the loss is not finite to begin with, or the maps at last.
    """
    settings = _Settings(steps, lr, gamma, lasso, group, batch_size, seed)
    refuse_steered(lm)
    names = _editable(lm, hook_names)
    texts = text_list(source, "source"), text_list(target, "target")
    for side, one in zip(("source", "target"), texts, strict=True):
        if len(one) < 2:
            raise ValueError(f"{side} holds one text; lineas compares distributions, of at least two texts a side.")
    with torch.inference_mode(False), torch.enable_grad():
        learning = _Learning(lm, texts[0], texts[1], names)
        start = learning.loss_on_all()
        losses = learning.run(settings, progress)
        end = _loss_at_end(lm, learning, lr)
    counts = {"source_texts": len(texts[0]), "target_texts": len(texts[1])}
    return LinEAS(learning.edits(), tuple(losses), start, end, lm.name, vars(settings) | counts)


def _editable(lm: LanguageModel, hook_names: str | Sequence[str]) -> list[str]:
    """The hooks in forward order. Raises `ValueError` for one that cannot be edited."""
    for name in hook_list(hook_names):
        if name not in lm.hook_names:
            raise unknown_hook(name, lm.hook_names, f"the editable hooks of {lm.name}")
    return sorted(set(hook_list(hook_names)), key=lm.hook_names.index)


class _Map:
    """What is learned at one hook: `x' = x + weight (x - mean) + shift std`, where zeros are the identity."""

    def __init__(self, x: Float[Tensor, "n_texts d_in"], device: Any) -> None:
        spread = x.std(0, correction=0)
        floor = (_FLOOR * spread.square().mean().sqrt()).clamp_min(1e-6 * x.square().mean().sqrt() + 1e-30)
        self.mean = x.mean(0).float().to(device)
        self.std = spread.clamp_min(floor).float().to(device)
        self.weight, self.shift = torch.zeros_like(self.mean), torch.zeros_like(self.mean)

    def edit(self, hook_name: str, weight: Tensor, shift: Tensor) -> AffineEdit:
        return AffineEdit(hook_name, weight, shift * self.std - weight * self.mean)

    def cost(self, u: Float[Tensor, "n d_in"], v: Float[Tensor, "m d_in"]) -> Tensor:
        """The loss at this hook."""
        u, v = ((x.to(self.mean) - self.mean) / self.std for x in (u, v))
        return transport_cost(u, v).sum()


class _Learning:
    """The maps while they are learned, and what they are learned from."""

    def __init__(self, lm: LanguageModel, source: list[Any], target: list[Any], names: list[str]) -> None:
        self.lm, self.source = lm, source
        self.target = {name: text_vectors(lm, target, name, "target") for name in names}
        self.maps = {name: _Map(text_vectors(lm, source, name, "source"), lm.device) for name in names}

    def edits(self) -> tuple[AffineEdit, ...]:
        return tuple(one.edit(name, one.weight, one.shift) for name, one in self.maps.items())

    def loss_on_all(self) -> float:
        """The loss on all texts, under the edits that are active."""
        found = {name: text_vectors(self.lm, self.source, name, "source") for name in self.maps}
        return float(sum(one.cost(found[name], self.target[name]) for name, one in self.maps.items()))

    def run(self, settings: _Settings, progress: bool) -> list[float]:
        """Take the steps; returns the loss before each. A step after which the loss is far above the smallest so far is taken
        again from where it began, half as long: at hooks of the residual stream, maps add up over the layers."""
        generator, losses, scale = torch.Generator().manual_seed(settings.seed), [], 1.0
        before, gradients = self._values(), []
        bar = tqdm(range(settings.steps), desc="LinEAS", unit="step", disable=not progress)
        for step in bar:
            loss, found = self._gradients(settings.batch_size, generator)
            if not losses and not math.isfinite(loss):
                raise SaelabError(f"The loss is {loss} before the first step: load the model in a wider dtype.")
            if losses and not loss <= _FAR_ABOVE * min(losses) + _FAR_ABOVE * _NOISE:
                scale, loss = scale / 2, losses[-1]
            else:
                scale, before, gradients = min(1.0, scale * _REGROWTH), self._values(), found
            losses.append(loss)
            lr = settings.lr * scale * (1 + math.cos(math.pi * step / settings.steps)) / 2
            self._move(before, gradients, lr, settings)
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        return losses

    def _values(self) -> list[Tensor]:
        return [value for one in self.maps.values() for value in (one.weight, one.shift)]

    def _gradients(self, batch_size: int, generator: torch.Generator) -> tuple[float, list[Tensor]]:
        """The loss on a batch, and its gradients, in the order of `_values`."""
        values = [value.clone().requires_grad_() for value in self._values()]
        pairs = zip(self.maps.items(), values[::2], values[1::2], strict=True)
        loss = self._loss(
            [one.edit(name, weight, shift) for (name, one), weight, shift in pairs], batch_size, generator
        )
        return float(loss.detach()), list(torch.autograd.grad(loss, values))

    def _move(self, before: list[Tensor], gradients: list[Tensor], lr: float, settings: _Settings) -> None:
        """A proximal step from `before`."""
        values = [value - lr * gradient for value, gradient in zip(before, gradients, strict=True)]
        lasso, group = (lr * settings.gamma * weight for weight in (settings.lasso, settings.group))
        for one, weight, shift in zip(self.maps.values(), values[::2], values[1::2], strict=True):
            one.weight, one.shift = (weight, shift) if not settings.gamma else shrink(weight, shift, lasso, group)

    def _loss(self, edits: Sequence[AffineEdit], batch_size: int, generator: torch.Generator) -> Tensor:
        """The loss on a batch of each side, with gradients towards what the edits are made from."""
        n_target = len(next(iter(self.target.values())))
        rows, wanted = (_drawn(n, batch_size, generator) for n in (len(self.source), n_target))
        batch = self.lm.to_batch([self.source[i] for i in rows])
        counted = counted_tokens(self.lm, batch).to(self.lm.device)
        found = differentiable_activations(self.lm, batch, list(self.maps), edits)
        share = (counted / counted.sum(1, keepdim=True)).float()  # (batch, seq)
        means = {name: (x.float() * share[..., None]).sum(1) for name, x in found.items()}
        costs = [one.cost(means[name], self.target[name][wanted]) for name, one in self.maps.items()]
        return torch.stack(costs).sum()


def _loss_at_end(lm: LanguageModel, learning: _Learning, lr: float) -> float:
    """The loss on all texts under the maps. Raises `SaelabError` if it is not finite, or they are not."""
    with lm.steer(*learning.edits()):
        end = learning.loss_on_all()
    numbers = torch.cat([value for one in learning.edits() for value in (one.weight, one.bias)])
    if not math.isfinite(end) or not bool(numbers.isfinite().all()):
        raise SaelabError(
            f"The maps learned with lr={lr:g} are not finite, or the model is not under them (loss {end:g}): take a smaller lr, "
            "such as 0.1, or more steps, in which those that are too long are halved."
        )
    return end


def _drawn(n: int, batch_size: int, generator: torch.Generator) -> list[int]:
    """The numbers of all texts, or of `batch_size` of them."""
    return list(range(n)) if n <= batch_size else torch.randperm(n, generator=generator)[:batch_size].tolist()
