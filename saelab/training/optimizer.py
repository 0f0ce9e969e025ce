"""One optimiser step of an SAE: schedule, projection, clip, Adam, renormalisation, in that order (the order matters)."""

from __future__ import annotations

import math

import torch

from saelab.distributed import SINGLE_PROCESS, Ranks
from saelab.kernels.primitives import project_
from saelab.saes import SAE
from saelab.training.adam import Adam
from saelab.training.config import TrainConfig
from saelab.training.feature_shards import ROWS
from saelab.training.running_norm import RunningNorm


def learning_rate(config: TrainConfig, base_lr: float, d_sae: int, step: int) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, constant, linear decay to 0 over the last `decay_fraction`."""
    peak = config.lr if config.lr is not None else base_lr * math.sqrt(4096 / d_sae)
    rising = (step + 1) / max(config.warmup_steps, 1)
    decay_steps = config.decay_fraction * config.n_steps
    falling = (config.n_steps - step) / decay_steps if decay_steps else 1.0
    return peak * min(1.0, rising, falling)


def apply_step(
    sae: SAE,
    adam: Adam,
    lr: float,
    clip_norm: float,
    shards: Ranks = SINGLE_PROCESS,
    running: RunningNorm | None = None,
) -> float:
    """Project, clip to `clip_norm` and to the limit of `running`, step, renormalise; returns the gradient norm before clipping.

    Clipping needs no extra pass: Adam divides each gradient as it reads it. A non-finite norm skips the update. With
    `shards` the norm is over all features.
    """
    if sae.unit_norm and sae.W_dec.grad is not None:
        project_(sae.W_dec.grad, sae.W_dec)
    gradients = [p.grad for name, p in sae.named_parameters() if shards.is_main_process or name in ROWS]
    norms = [torch.linalg.vector_norm(grad, dim=-1).norm() for grad in gradients if grad is not None]
    total = torch.stack(norms).norm() if norms else torch.zeros(())
    norm = float(shards.all_reduce_sum(total.square()).sqrt() if shards.size > 1 else total)
    if math.isfinite(norm):
        adam.step(lr, grad_scale=max(1.0, norm / clip_norm, running.excess(norm) if running is not None else 1.0))
        sae.after_step()
    adam.zero_grad()
    return norm
