"""One optimiser step of an SAE: schedule, projection, clip, Adam, renormalisation, in that order (the order matters)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.saes import SAE
from saelab.training.config import TrainConfig


def learning_rate(config: TrainConfig, base_lr: float, d_sae: int, step: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, flat, linear decay to 0 over the last `decay_fraction`."""
    peak = config.lr if config.lr is not None else base_lr * math.sqrt(4096 / d_sae)
    rising = (step + 1) / max(config.warmup_steps, 1)
    decay_steps = config.decay_fraction * config.n_steps
    falling = (config.n_steps - step) / decay_steps if decay_steps else 1.0
    return peak * min(1.0, rising, falling)


@torch.no_grad()
def project_decoder_gradient(gradient: Float[Tensor, "d_sae d_in"], W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Remove, in place, the part of each row's gradient along that row (rows have unit norm)."""
    along = torch.linalg.vecdot(gradient, W_dec)  # (d_sae)
    gradient.addcmul_(along[:, None], W_dec, value=-1)


def build_adam(sae: SAE) -> torch.optim.Adam:
    """Adam(0.9, 0.999) over the SAE's parameters; the rate is set anew at each step."""
    return torch.optim.Adam(sae.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def apply_step(sae: SAE, adam: torch.optim.Adam, lr: float, clip_norm: float) -> float:
    """Project, clip, step, renormalise; gives the gradient norm before clipping."""
    if sae.unit_norm and sae.W_dec.grad is not None:
        project_decoder_gradient(sae.W_dec.grad, sae.W_dec)
    norm = float(torch.nn.utils.clip_grad_norm_(sae.parameters(), clip_norm, foreach=True))
    if math.isfinite(norm):
        adam.param_groups[0]["lr"] = lr
        adam.step()
        sae.after_step()
    adam.zero_grad(set_to_none=True)
    return norm
