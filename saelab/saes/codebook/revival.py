"""Initial codes and dead-code revival: k-means, replacement by inputs, the online clustered codebook.

All functions handle one codebook (group). Random numbers come from a generator that the caller seeds with seed and step.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from saelab.kernels.primitives import spmm_transposed
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.codebook.nearest import most_similar

RHO = 1e-4
"""Noise per entry on an input that becomes a code, as a fraction of the input's norm."""
DECAY = 0.99
"""Decay of the online codebook's usage average."""


def generator_of(seed: int, step: int) -> torch.Generator:
    """The random generator of one step, the same after a resume."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)  # torch uses only 32 bits of the seed


@torch.no_grad()
def draw_inputs(
    x: Float[Tensor, "n d"], count: int, generator: torch.Generator, rho: float = RHO
) -> Float[Tensor, "count d"]:
    """`count` random rows of `x`, none repeated before all are drawn, plus `rho |x|` times N(0, 1)."""
    rounds = [torch.randperm(len(x), generator=generator) for _ in range(-(-count // len(x)))]
    rows = x[torch.cat(rounds)[:count].to(x.device)] if rounds else x[:0]
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    return rows + rho * rows.norm(dim=1, keepdim=True) * noise


@torch.no_grad()
def kmeans(
    x: Float[Tensor, "n d"], n_codes: int, generator: torch.Generator, n_rounds: int = 10
) -> Float[Tensor, "n_codes d"]:
    """Lloyd's algorithm on the rows of a batch, starting from random ones; a code nearest to no row stays where it is."""
    codes = draw_inputs(x, n_codes, generator)
    for _ in range(n_rounds):
        nearest = most_similar(x, codes, 1, "euclidean")[:, 0]
        ones, offsets = torch.ones_like(x[:, 0]), torch.arange(len(x) + 1, device=x.device)
        sums = spmm_transposed(SparseActs(ones, nearest, offsets, n_codes), ones, x)
        counts = torch.bincount(nearest, minlength=n_codes)[:, None]
        codes = torch.where(counts > 0, sums / counts.clamp_min(1), codes)
    return codes


@torch.no_grad()
def usage_after(usage: Float[Tensor, " n_codes"], ids: Int[Tensor, " kept"]) -> Float[Tensor, " n_codes"]:
    """`0.99 N + 0.01 p`, with p the fraction of the batch's selections that went to each code."""
    share = torch.bincount(ids, minlength=len(usage)).to(usage) / max(len(ids), 1)
    return DECAY * usage + (1 - DECAY) * share


@torch.no_grad()
def towards_anchors(
    codes: Float[Tensor, "n_codes d"], usage: Float[Tensor, " n_codes"], anchors: Float[Tensor, "n_codes d"]
) -> Float[Tensor, "n_codes d"]:
    """`(1 - alpha) c + alpha anchor`, alpha = exp(-10 N K / (1 - 0.99) - 1e-3): near 1 for an unused code."""
    alpha = torch.exp(-10 * usage * len(codes) / (1 - DECAY) - 1e-3)[:, None]
    return (1 - alpha) * codes + alpha * anchors


@torch.no_grad()
def closest_inputs(
    x: Float[Tensor, "n d"], codes: Float[Tensor, "n_codes d"], similarity: str
) -> Float[Tensor, "n_codes d"]:
    """The anchor of each code: the input of the batch that is most similar to it."""
    if similarity == "euclidean":
        return x[torch.cdist(codes, x).argmin(1)]
    return x[(normalize(codes, dim=1) @ normalize(x, dim=1).T).argmax(1)]
