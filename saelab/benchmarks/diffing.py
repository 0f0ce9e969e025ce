"""Which features of a crosscoder belong to one model alone: what its decoder says, what is true, what Latent Scaling says
(Minder et al. 2025, arXiv 2504.02922, section 3).

    Delta_i = ((|d_i^2| - |d_i^1|) / max(|d_i^1|, |d_i^2|) + 1) / 2: below 0.1 or above 0.9 the feature is called exclusive
    beta_i^m = argmin_b sum_t |y_t^m - b z_ti d_i|^2,   nu_i = beta_i^(other) / beta_i^(own)

with d_i the direction in the model that has the feature. y is the model's error with feature i put back (nu_eps: was the
feature there and shrunk away?) or its reconstruction (nu_r: do other features write it?).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.benchmarks.recovery import cosines

EXCLUSIVE = 0.9
NU_EPS, NU_R = 0.2, 0.5
"""From these ratios on an exclusive feature counts as an artefact (their section 3.1)."""

Rows = Float[Tensor, "n 2 d_in"]
Decoder = Float[Tensor, "d_sae 2 d_in"]


def relative_norms(decoder: Decoder) -> Float[Tensor, " d_sae"]:
    """Delta of each feature: 0 is the first model's alone, 1 the second's, 0.5 both's."""
    first, second = decoder.norm(dim=2).unbind(1)
    return ((second - first) / torch.maximum(first, second).clamp_min(1e-12) + 1) / 2


def scaling_ratios(
    x: Rows, x_hat: Rows, codes: Float[Tensor, "n d_sae"], decoder: Decoder
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """`nu_eps`, `nu_r` of each feature, own being the model in which its decoder is longer; NaN where it never fires."""
    own = decoder.norm(dim=2).argmax(1)
    direction = decoder[torch.arange(len(decoder)), own]  # (d_sae, d_in)
    square = codes.square().sum(0)

    def slopes(y: Rows) -> Tensor:
        """sum_t z_ti y_t . d_i, over the squares: (d_sae, 2)."""
        return torch.einsum("ni,nsd,id->is", codes, y, direction) / square[:, None]

    errors = slopes(x - x_hat) + torch.einsum("isd,id->is", decoder, direction)
    return tuple(_other_over_own(slope, own) for slope in (errors, slopes(x_hat)))  # pyright: ignore[reportReturnType]


def _other_over_own(slope: Float[Tensor, "d_sae 2"], own: Tensor) -> Float[Tensor, " d_sae"]:
    rows = torch.arange(len(slope))
    return slope[rows, 1 - own] / slope[rows, own]


def exclusives(
    features: Float[Tensor, "n_features 2 d_in"],
    decoder: Decoder,
    nu_eps: Float[Tensor, " d_sae"],
    nu_r: Float[Tensor, " d_sae"],
) -> dict[str, float | None]:
    """`exclusives`: learned features that fire and are called exclusive to a model; `false_exclusives`: those whose nearest
    planted feature the other model has too; `flagged_false`, `flagged_true`: the share that Latent Scaling calls artefacts
    among the false and among the others (None without any)."""
    delta = relative_norms(decoder)
    called = ((delta > EXCLUSIVE) | (delta < 1 - EXCLUSIVE)) & nu_eps.isfinite()
    own = decoder.norm(dim=2).argmax(1)
    nearest = torch.stack([cosines(features[:, s], decoder[:, s]).argmax(0) for s in (0, 1)], 1)
    nearest = nearest[torch.arange(len(decoder)), own]  # (d_sae) planted feature
    false = called & (features[nearest, 1 - own].norm(dim=1) > 0)
    flagged = (nu_eps >= NU_EPS) | (nu_r >= NU_R)
    return {
        "exclusives": float(called.sum()),
        "false_exclusives": float(false.sum()),
        "flagged_false": _share(flagged[false]),
        "flagged_true": _share(flagged[called & ~false]),
    }


def _share(flags: Tensor) -> float | None:
    return float(flags.float().mean()) if len(flags) else None
