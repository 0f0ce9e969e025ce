"""Adam (Kingma & Ba 2015, algorithm 1) over all parameters in one fused pass, clipping included.

The arithmetic is torch's fused kernel. `torch.optim` itself is not used, as it imports torch's compiler (160 MB, two
seconds) for hooks that nothing here needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPS = 1e-8
SMALL_STEP = 2**21
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_EVERY = 128


def default_eps(batch_size: int, width: int) -> float:
    """1e-8, or less if a step reconstructs more than `SMALL_STEP` numbers, as gradients are then smaller too.

    FVU is a mean over all numbers of a batch, so the gradient of a weight is proportional to 1 / (batch_size * width), and
    in large runs a fixed eps would be of comparable size. At 8,192 tokens of width 4,096 this is 6.25e-10 (Gao et al. 2024).
    """
    return EPS * min(1.0, SMALL_STEP / (batch_size * width))


class Adam:
    """Each step is given its learning rate; `decay` maps parameters to their weight decay, decoupled from the gradient
    (AdamW, Loshchilov & Hutter 2019). Parameters that require no gradient are left alone."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        decay: Mapping[nn.Parameter, float] | None = None,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.betas, self.eps = betas, eps
        # Moments below this change no weight. Those of features that do not fire would decay to denormal numbers and stay
        # there, which makes a CPU five to ten times slower; they are set to 0 every `_EVERY` steps.
        self._nothing = {"exp_avg": min(1e-30, 1e-19 * eps), "exp_avg_sq": min(1e-36, (1e-7 * eps) ** 2)}
        self._decay = [(decay or {}).get(p, 0.0) for p in self.parameters]
        self._state: dict[str, list[Tensor]] = {
            "step": [torch.zeros((), dtype=torch.float32, device=p.device) for p in self.parameters],
            "exp_avg": [torch.zeros_like(p) for p in self.parameters],
            "exp_avg_sq": [torch.zeros_like(p) for p in self.parameters],
        }

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """One step with the gradients divided by `grad_scale`; parameters without a gradient are unchanged."""
        device = self.parameters[0].device if self.parameters else None
        scale = None if grad_scale == 1.0 else torch.tensor(grad_scale, dtype=torch.float32, device=device)
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
            **{"lr": lr, "beta1": self.betas[0], "beta2": self.betas[1], "weight_decay": decay, "eps": self.eps},
            **{"amsgrad": False, "maximize": False, "grad_scale": scale, "found_inf": None},
        )
        if steps and not steps[0].is_cuda and int(steps[0]) % _EVERY == 0:
            for name, moments in (("exp_avg", averages), ("exp_avg_sq", squares)):
                for each in moments:
                    torch.hardshrink(each, self._nothing[name], out=each)

    def moments(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """The two moments of a parameter, not copies."""
        index = next(i for i, known in enumerate(self.parameters) if known is parameter)
        return self._state["exp_avg"][index], self._state["exp_avg_sq"][index]

    def note_steps(self, n: int) -> None:
        """Set the number of steps made, for one that was made elsewhere, on the moments."""
        for count in self._state["step"]:
            count.fill_(n)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The moments by "INDEX.NAME", in the order of the parameters; not copies, so that writing to them restores the state."""
        return {
            f"{index}.{name}": self._state[name][index] for index in range(len(self.parameters)) for name in _MOMENTS
        }
