"""How well the norm of an SAE's feature activations matches the norm of its input (Lee et al. 2025, see `saes/top_afa.py`).

If `x = sum_i f_i w_i` with n unit vectors of which no two have a cosine beyond epsilon, then

    | |x|^2 - |f|^2 |  <=  epsilon (|f|_1^2 - |f|^2)  <=  epsilon (n - 1) |f|^2,

so `|x|`, the approximate feature activation (AFA), estimates `|f|`, and the left side bounds epsilon from below. Here f are the
lengths of what the features write, `z_i |d_i|` in raw units, and as one more that of the biases; n is d_sae + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.saes import SAE


class NormPairs(NamedTuple):
    """The two norms of each token, float64: plotted against each other they are the ZF plot of Lee et al."""

    x: Float[Tensor, " n"]
    """Norm of the activations |x|, which approximates that of the feature activations."""
    f: Float[Tensor, " n"]
    """Norm of the feature activations |f|."""
    f_l1: Float[Tensor, " n"]
    """Sum of the |f_i|."""
    n_vectors: int
    """Vectors that f may be on: the features and the biases."""


@torch.no_grad()
def norm_pairs(sae: SAE, x: Float[Tensor, "n d_in"]) -> NormPairs:
    """The norms of raw activations and of their feature activations.

    Raises `ValueError` for SAEs whose features do not add up to a reconstruction of `x` itself.
    """
    if sae.extra_dims or sae.variant == "codebook":
        raise ValueError(
            f"A {sae.variant} does not reconstruct the activations it reads as a sum of features times activations, so their "
            "norms cannot be compared; use an SAE on one hook, such as topk."
        )
    feature_acts = sae.encode(x)
    rows, scale = sae.decoder()
    lengths = feature_acts.values.double().abs() * (rows.double().norm(dim=1) / scale.double())[feature_acts.features]
    lengths = feature_acts.with_values(lengths * sae.token_sizes(x).double().squeeze(1)[feature_acts.rows]).to_dense()
    nothing = feature_acts.where(torch.zeros_like(feature_acts.features, dtype=torch.bool))
    f = torch.cat([lengths, sae.decode(nothing, x).double().norm(dim=1)[:, None]], dim=1)
    return NormPairs(x.double().norm(dim=1), f.norm(dim=1), f.sum(1), sae.d_sae + 1)


def afa_error(pairs: NormPairs) -> float:
    """Mean over tokens of `(|f| - |x|)^2`, in squared raw units."""
    return float((pairs.f - pairs.x).square().mean())


def epsilon_lbo(pairs: NormPairs) -> Float[Tensor, " n"]:
    """Each token's lower bound on epsilon, `| |x|^2 - |f|^2 | / ((n - 1) |f|^2)`: infinite where f is 0 and x is not."""
    return _over(pairs, (pairs.n_vectors - 1) * pairs.f.square())


def epsilon_lbo_active(pairs: NormPairs) -> Float[Tensor, " n"]:
    """A bound at least as high (ours), from the activations themselves: `| |x|^2 - |f|^2 | / (|f|_1^2 - |f|^2)`.

    Infinite where a single vector is active and has another norm than x.
    """
    return _over(pairs, pairs.f_l1.square() - pairs.f.square())


def _over(pairs: NormPairs, most: Tensor) -> Tensor:
    """The difference of the squared norms over what it may be per unit of epsilon; 0 where there is none."""
    difference = (pairs.x.square() - pairs.f.square()).abs()
    return torch.where(difference == 0, 0.0, difference / most.clamp_min(0))
