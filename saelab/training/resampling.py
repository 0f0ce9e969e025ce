"""Resampling of dead features (Bricken et al. 2023, "Towards monosemanticity"): they start again from inputs that are
reconstructed badly. A dead feature i takes a token t, each at most once, with a probability in proportion to |x_t - x_hat_t|^4:

    d_i = v / |v|,   w_i = 0.2 mean_alive |w_j| v / |v|,   b_i = 0,   v = x_t - b_dec

and Adam's moments of its weights are 0 again. Ours: tokens of the step's own batch, where the paper reads 819,200, and the number
of steps between resamplings; a feature counts as alive afterwards. `L1Config.resample_every` turns it on.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activation_cache.layout import seeded
from saelab.kernels.decode import decode_error
from saelab.saes import StepInfo
from saelab.saes.l0_controller import L1SAE
from saelab.training.adam import Adam
from saelab.training.dead_features import DeadFeatures

TIMES = 4
"""Resamplings in a run at most, as in the paper."""


def is_due(sae: object, step: int, n_steps: int) -> bool:
    """Whether dead features are resampled after this step: after every `resample_every` steps, `TIMES` times, and not after the
    last step."""
    every = sae.config.resample_every if isinstance(sae, L1SAE) else None
    return every is not None and (step + 1) % every == 0 and (step + 1) // every <= TIMES and step + 1 < n_steps


@torch.no_grad()
def resample(
    sae: L1SAE, adam: Adam, dead: DeadFeatures, x: Float[Tensor, "batch d_in"], seed: int, info: StepInfo
) -> int:
    """Start dead features again from rows of raw activations `x`, as many as there are of both; returns how many."""
    x = sae.normalize(x)
    errors = torch.cat([_errors(sae, rows) for rows in x.split(2048)]).double().cpu()
    weights = (errors / errors.max().clamp_min(torch.finfo(errors.dtype).tiny)).square()
    features = dead.dead.nonzero().flatten()
    n = min(len(features), int((weights > 0).sum()))
    if not n:
        return 0
    tokens = torch.multinomial(weights, n, generator=seeded("resample", seed, info.step))
    features = features[:n]
    alive = ~dead.dead
    length = 0.2 * (sae.W_enc[alive] if bool(alive.any()) else sae.W_enc).norm(dim=1).mean()
    directions = torch.nn.functional.normalize(x[tokens.to(x.device)] - sae.b_dec, dim=1)
    for parameter in sae.restart(features, directions, length):
        for moments in adam.moments(parameter):
            moments[features] = 0
    dead.tokens_since_fired[features] = 0
    return n


def _errors(sae: L1SAE, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, " batch"]:
    """Squared error of each normalised row."""
    return decode_error(sae.encode_normalized(x), sae.W_dec, sae.b_dec, x)[1].square().sum(1)
