"""Clipping by what gradients usually are: a limit that needs no knowledge of a loss's scale (of an FVU norms are about 0.05, of a
squared error summed over dimensions 50 to 1,000)."""

from __future__ import annotations

import torch

_DECAY = 0.99


class RunningNorm:
    """The mean gradient norm of the last hundred steps or so, and a limit of `times` that."""

    def __init__(self, times: float, device: torch.device) -> None:
        self.times = times
        self.state = torch.zeros(2, dtype=torch.float64, device=device)
        """Weighted sum of the norms, and of the weights."""

    def excess(self, norm: float) -> float:
        """How many times the limit `norm` is, at least 1; then it is taken in, cut to the limit."""
        total, weight = self.state.tolist()
        factor = max(1.0, norm * weight / (self.times * total)) if total else 1.0
        self.state.mul_(_DECAY)
        self.state += (1 - _DECAY) * self.state.new_tensor([norm / factor, 1.0])
        return factor
