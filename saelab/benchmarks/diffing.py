"""Which features of a two-model crosscoder are classified as exclusive to one model, which truly are, and which of them
Latent Scaling flags (Minder et al. 2025, arXiv 2504.02922, section 3; the measures are in `evaluation/crosscoder.py`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.benchmarks.recovery import cosines
from saelab.evaluation.crosscoder import compare_decoders, latent_scaling
from saelab.saes import CrosscoderSAE

EXCLUSIVE = 0.9
NU_EPS, NU_R = 0.2, 0.5
"""An exclusive feature is an artefact if the magnitude of one of its ratios is at least this (their section 3.1)."""


def own_ratios(
    sae: CrosscoderSAE, x: Float[Tensor, "n 2 d_in"]
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """`nu_eps` and `nu_r` of each feature, for the model b with the larger decoder norm; NaN if it never fires."""
    of_first, of_second = (latent_scaling(sae, [x], 1 - b, b) for b in (0, 1))
    second = compare_decoders(sae).delta > 0.5
    return (
        torch.where(second, of_second.nu_error, of_first.nu_error),
        torch.where(second, of_second.nu_reconstruction, of_first.nu_reconstruction),
    )


def exclusives(
    features: Float[Tensor, "n_features 2 d_in"],
    decoder: Float[Tensor, "d_sae 2 d_in"],
    delta: Float[Tensor, " d_sae"],
    nu_eps: Float[Tensor, " d_sae"],
    nu_r: Float[Tensor, " d_sae"],
) -> dict[str, float | None]:
    """`exclusives`: number of learned features that fire and are exclusive to one model by `delta` (above 0.9 or below 0.1);
    `false_exclusives`: those whose nearest planted feature is also in the other model; `flagged_false`, `flagged_true`: the
    fraction of false and of true exclusives that Latent Scaling flags as artefacts (None if there are none)."""
    called = ((delta > EXCLUSIVE) | (delta < 1 - EXCLUSIVE)) & nu_eps.isfinite()
    side = (delta > 0.5).long()
    nearest = torch.stack([cosines(features[:, s], decoder[:, s]).argmax(0) for s in (0, 1)], 1)
    nearest = nearest[torch.arange(len(decoder)), side]  # (d_sae) planted feature
    false = called & (features[nearest, 1 - side].norm(dim=1) > 0)
    flagged = (nu_eps.abs() >= NU_EPS) | (nu_r.abs() >= NU_R)
    return {
        "exclusives": float(called.sum()),
        "false_exclusives": float(false.sum()),
        "flagged_false": _share(flagged[false]),
        "flagged_true": _share(flagged[called & ~false]),
    }


def _share(flags: Tensor) -> float | None:
    return float(flags.float().mean()) if len(flags) else None
