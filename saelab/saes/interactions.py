"""Interactions of features: what the product of two of them decodes to, where a decoder has products (`poly.py`):

    coefficient of z_i z_j:   lambda_2 C_2 (U_1[i] * U_2[j] + U_1[j] * U_2[i])

in raw units, per unit of both activations; of z_i^2 it is half of that. Products of three features are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.precision import widened
from saelab.saes.poly import PolySAE


@torch.no_grad()
def pair_directions(sae: Any, feature: int) -> Float[Tensor, "d_sae d_in"]:
    """The coefficients of this feature with every other, and in its own row of its square. Raises `ValueError` for an SAE whose
    decoder has no products."""
    C_2, U_1, U_2 = _factors(sae)
    both = U_1[feature] * U_2 + U_1 * U_2[feature]
    both[feature] /= 2
    return both @ C_2.T


@torch.no_grad()
def pair_norms(sae: Any, features: Sequence[int]) -> Float[Tensor, "n n"]:
    """The norms of the coefficients of all pairs of these features; on the diagonal, of their squares. Raises `ValueError` as
    `pair_directions`."""
    C_2, U_1, U_2 = _factors(sae)
    U_1, U_2 = U_1[list(features)], U_2[list(features)]
    gram = C_2.T @ C_2
    norms = torch.empty(len(U_1), len(U_1), dtype=gram.dtype, device=gram.device)
    for i in range(len(U_1)):
        both = U_1[i] * U_2 + U_1 * U_2[i]  # (n, R_2)
        norms[i] = ((both @ gram) * both).sum(1).clamp_min(0).sqrt()
    norms.diagonal().div_(2)
    return norms


def _factors(sae: Any) -> tuple[Tensor, Tensor, Tensor]:
    """lambda_2 C_2 in raw units, and U_1 and U_2, all with R_2 columns."""
    if not isinstance(sae, PolySAE):
        raise ValueError(f"The decoder of a {sae.variant} has no products of features: interactions need a poly SAE.")
    U_1, U_2, _ = sae.projections(sae.U)
    C_2, U_1, U_2, lambda2 = widened(sae.C.split(sae.ranks, 1)[1], U_1[:, : sae.ranks[1]], U_2, sae.lambda2)
    return lambda2 * C_2 / sae.scale, U_1, U_2
