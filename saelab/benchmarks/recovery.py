"""How many planted features a dictionary recovers, by cosines between true and learned features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

FOUND = 0.9


def cosines(
    features: Float[Tensor, "n_features d_in"], learned: Float[Tensor, "d_sae d_in"], signed: bool = False
) -> Float[Tensor, "n_features d_sae"]:
    """Cosine of each true feature with each learned one; with `signed` its magnitude, as an axis has no sign."""
    cosine = normalize(features, dim=1) @ normalize(learned, dim=1).T
    return cosine.abs() if signed else cosine


def recovery(
    features: Float[Tensor, "n_features d_in"],
    learned: Float[Tensor, "d_sae d_in"],
    signed: bool = False,
    groups: Mapping[str, slice] | None = None,
) -> dict[str, float]:
    """`mmcs` (mean over true features of the largest cosine), `recovered` (fraction of them with a cosine above 0.9),
    `copies` (learned features above 0.9 per recovered true one; 0 if none is recovered), and `mmcs_GROUP`,
    `recovered_GROUP`."""
    cosine = cosines(features, learned, signed)
    best = cosine.amax(1)
    found = best > FOUND
    copies = (cosine > FOUND).sum(1)[found]
    measures = {"mmcs": best.mean(), "recovered": found.float().mean()}
    measures["copies"] = copies.float().mean() if len(copies) else torch.zeros(())
    for name, group in (groups or {}).items():
        measures |= {f"mmcs_{name}": best[group].mean(), f"recovered_{name}": found[group].float().mean()}
    return {name: float(value) for name, value in measures.items()}
