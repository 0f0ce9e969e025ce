"""Adam (Kingma & Ba 2015, algorithm 1) over all parameters in one fused pass, clipping included.

The arithmetic is torch's own fused kernel; what is left out is `torch.optim`'s machinery, which loads torch's compiler
(160 MB, two seconds) for the sake of hooks that nothing here uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPS = 1e-8
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_EVERY = 128
_NOTHING = {"exp_avg": 1e-30, "exp_avg_sq": 1e-36}
"""Moments up to here move no weight. Those of features that do not fire would sink to denormal numbers and stay there,
with which a CPU computes five to ten times slower; they become 0 every `_EVERY` steps."""


class Adam:
    """Betas 0.9 and 0.999, eps 1e-8; the rate is given to each step.

    `decay` names the weight decay of some parameters, apart from the gradient (AdamW, Loshchilov & Hutter 2019).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: Mapping[nn.Parameter, float] | None = None) -> None:
        self.parameters = list(parameters)
        self._decay = [(decay or {}).get(p, 0.0) for p in self.parameters]
        self._state: dict[str, list[Tensor]] = {
            "step": [torch.zeros((), dtype=torch.float32, device=p.device) for p in self.parameters],
            "exp_avg": [torch.zeros_like(p) for p in self.parameters],
            "exp_avg_sq": [torch.zeros_like(p) for p in self.parameters],
        }

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """One step with the gradients divided by `grad_scale`; parameters without a gradient stay."""
        first = self.parameters[0]
        scale = None if grad_scale == 1.0 else torch.tensor(grad_scale, dtype=torch.float32, device=first.device)
        given = [index for index, p in enumerate(self.parameters) if p.grad is not None]
        for decay in sorted(set(self._decay)):
            self._step([index for index in given if self._decay[index] == decay], lr, decay, scale)

    def _step(self, used: list[int], lr: float, decay: float, scale: Tensor | None) -> None:
        """Step the parameters `used` (their indices)."""
        parameters = [self.parameters[index] for index in used]
        gradients = [p.grad for p in parameters]
        steps, averages, squares = ([self._state[name][index] for index in used] for name in _MOMENTS)
        for count in steps:
            count += 1
        torch.ops.aten._fused_adamw_(
            *(parameters, gradients, averages, squares, [], steps),
            **{"lr": lr, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": decay, "eps": EPS},
            **{"amsgrad": False, "maximize": False, "grad_scale": scale, "found_inf": None},
        )
        if steps and not steps[0].is_cuda and int(steps[0]) % _EVERY == 0:
            for name, moments in (("exp_avg", averages), ("exp_avg_sq", squares)):
                for each in moments:
                    torch.hardshrink(each, _NOTHING[name], out=each)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The moments under "INDEX.NAME", index in the order of the parameters; no copies, so that they can be written to."""
        return {
            f"{index}.{name}": self._state[name][index] for index in range(len(self.parameters)) for name in _MOMENTS
        }
