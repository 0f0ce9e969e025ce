"""Gradients summed over ranks with one flat all-reduce."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from saelab.distributed.collectives import Ranks


class GradientSum:
    """Call it after the backward pass: `p.grad` of each parameter becomes the sum over the ranks.

    The sums lie in one buffer, which is used again at every step. A parameter that has a gradient on no rank stays
    without one.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self.parameters, self.ranks = list(parameters), ranks
        self._flat: Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        if self.ranks.size == 1 or not self.parameters:
            return
        given = [p.grad is not None for p in self.parameters]
        sizes = [p.numel() for p in self.parameters]
        if self._flat is None:
            self._flat = self.parameters[0].new_empty(sum(sizes) + len(sizes))
        *gradients, flags = self._flat.split([*sizes, len(sizes)])
        sums = [part.as_strided(p.shape, p.stride()) for part, p in zip(gradients, self.parameters, strict=True)]
        for total, p in zip(sums, self.parameters, strict=True):
            total.zero_() if p.grad is None else total.copy_(p.grad)
        flags.copy_(torch.tensor(given))
        self.ranks.all_reduce_sum_(self._flat)
        for total, p, anywhere in zip(sums, self.parameters, flags.tolist(), strict=True):
            p.grad = total if anywhere else None
