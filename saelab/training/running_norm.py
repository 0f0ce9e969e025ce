"""Gradient clipping relative to the running mean of the norm, and so independent of the scale of the loss (norms are about 0.05
for an FVU, and 50 to 1,000 for a squared error summed over dimensions)."""

from __future__ import annotations

import torch

_DECAY = 0.99


class RunningNorm:
    """Mean gradient norm over about the last hundred steps, and a limit of `times` that."""

    def __init__(self, times: float, device: torch.device) -> None:
        self.times = times
        self.state = torch.zeros(2, dtype=torch.float64, device=device)
        """Weighted sum of the norms, and the sum of the weights."""

    def excess(self, norm: float) -> float:
        """Ratio of `norm` to the limit, at least 1; then updates the mean with `norm`, clipped to the limit."""
        total, weight = self.state.tolist()
        factor = max(1.0, norm * weight / (self.times * total)) if total else 1.0
        self.state.mul_(_DECAY)
        self.state += (1 - _DECAY) * self.state.new_tensor([norm / factor, 1.0])
        return factor
