"""One optimiser step of an SAE: schedule, projection, clip, Adam, renormalisation, in that order (the order matters)."""

from __future__ import annotations

import math

import torch

from saelab.kernels.rows import project_
from saelab.saes import SAE
from saelab.training.adam import Adam
from saelab.training.config import TrainConfig


def learning_rate(config: TrainConfig, base_lr: float, d_sae: int, step: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, flat, linear decay to 0 over the last `decay_fraction`."""
    peak = config.lr if config.lr is not None else base_lr * math.sqrt(4096 / d_sae)
    rising = (step + 1) / max(config.warmup_steps, 1)
    decay_steps = config.decay_fraction * config.n_steps
    falling = (config.n_steps - step) / decay_steps if decay_steps else 1.0
    return peak * min(1.0, rising, falling)


def apply_step(sae: SAE, adam: Adam, lr: float, clip_norm: float) -> float:
    """Project, clip, step, renormalise; gives the gradient norm before clipping.

    Clipping costs no pass of its own: Adam divides each gradient as it reads it. A norm that is not finite changes
    nothing.
    """
    if sae.unit_norm and sae.W_dec.grad is not None:
        project_(sae.W_dec.grad, sae.W_dec)
    norms = [torch.linalg.vector_norm(p.grad, dim=-1).norm() for p in sae.parameters() if p.grad is not None]
    norm = float(torch.stack(norms).norm())
    if math.isfinite(norm):
        adam.step(lr, grad_scale=max(1.0, norm / clip_norm))
        sae.after_step()
    adam.zero_grad()
    return norm
