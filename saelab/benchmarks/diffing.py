"""Which features of a two-model crosscoder are called one model's own, which truly are, and what Latent Scaling says of them
(Minder et al. 2025, arXiv 2504.02922, section 3; the measures themselves stand in `evaluation/crosscoder.py`).
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
"""From these ratios on, of either sign, an exclusive feature counts as an artefact (their section 3.1)."""


def own_ratios(
    sae: CrosscoderSAE, x: Float[Tensor, "n 2 d_in"]
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """`nu_eps`, `nu_r` of each feature, b being the model in which its decoder is longer; NaN where it never fires."""
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
    """`exclusives`: learned features that fire and are called exclusive to a model (`delta` over 0.9 or under 0.1);
    `false_exclusives`: those whose nearest planted feature the other model has too; `flagged_false`, `flagged_true`: the
    share that Latent Scaling calls artefacts among the false and among the others (None without any)."""
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
