"""Normalisation of each token by its own statistics (`normalize="layer_norm"` or "constant_norm"; for "whiten" see `whitening`):

    layer_norm:     x_norm = (x - mean(x)) / (std(x) + 1e-5),   x_hat = x_hat_norm std(x) + mean(x)
    constant_norm:  x_norm = x sqrt(d_in) / |x|,                x_hat = x_hat_norm |x| / sqrt(d_in)

with mean and (unbiased) standard deviation over the d_in dimensions of the token. The first is that of OpenAI's SAEs (Gao et
al. 2024 and their code); both are options of SAELens (`layer_norm`, `constant_norm_rescale`). To reconstruct, an SAE then
needs the raw activations again.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.primitives import sddmm
from saelab.saes.whitening import WHITEN

TOKEN_NORMS = ("layer_norm", "constant_norm", WHITEN)
_EPS = 1e-5


def normalize_tokens(kind: str, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
    """Each token in normalised units; zeros stay zero. `x` itself for any other kind of normalisation."""
    if kind == "layer_norm":
        return (x - _means(x)) / (token_sizes(kind, x) + _EPS)
    if kind == "constant_norm":
        return x / token_sizes(kind, x).clamp_min(torch.finfo(x.dtype).tiny)
    return x


def restore_tokens(kind: str, normalized: Float[Tensor, "batch d"], x: Float[Tensor, "tokens d"]) -> Tensor:
    """`(batch, d)` in normalised units, mapped to mean and size of the tokens `x`."""
    if len(x) != len(normalized):
        raise ValueError(
            f"These are feature activations of {len(normalized)} tokens, and x has {len(x)}: pass their own x."
        )
    restored = normalized * token_sizes(kind, x)
    return restored + _means(x) if kind == "layer_norm" else restored


def token_sizes(kind: str, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch 1"]:
    """One normalised unit in raw units, for each token: 1 unless tokens are normalised one by one."""
    if kind == "layer_norm":
        return _norms(x - _means(x)) / math.sqrt(max(x.shape[1] - 1, 1))
    if kind == "constant_norm":
        return _norms(x) / math.sqrt(x.shape[1])
    return torch.ones_like(x[:, :1])


def normalized_moments(kind: str, mean: Float[Tensor, " d"], mean_square: float | Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(d)` and mean squared norm (fp64) of normalised tokens, from the moments of the raw ones, as if all had one size."""
    d, square = len(mean), float(mean_square)
    if kind == WHITEN:
        return torch.zeros_like(mean), torch.tensor(float(d), dtype=torch.float64)
    middle = float(mean.mean()) if kind == "layer_norm" else 0.0
    size = max((square - d * middle**2) / d, torch.finfo(torch.float32).tiny) ** 0.5
    return (mean - middle) / size, torch.tensor(float(d), dtype=torch.float64)


def _means(x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch 1"]:
    """By `sddmm`, whose result for a row is independent of the rest of the batch, as torch's sums are not everywhere."""
    ids = torch.arange(len(x) + 1, device=x.device)
    return sddmm(x, torch.ones_like(x[:1]), torch.zeros_like(ids[1:]), ids)[:, None] / x.shape[1]


def _norms(x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch 1"]:
    ids = torch.arange(len(x) + 1, device=x.device)
    return sddmm(x, x, ids[:-1], ids).sqrt()[:, None]
