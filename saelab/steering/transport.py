"""The loss of LinEAS: squared Wasserstein distance between the distributions of each coordinate in two sets of vectors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def transport_cost(u: Float[Tensor, "n d"], v: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """W2^2 of each coordinate: the mean squared distance of the sorted values, which are each matched with the values at the same
    quantiles if the sets differ in size. Independent of the order of the rows."""
    n, m = len(u), len(v)
    u, v = u.sort(dim=0).values, v.sort(dim=0).values
    if n == m:
        return (u - v).square().mean(0)
    cuts = torch.cat([torch.arange(n + 1) * m, torch.arange(1, m) * n]).unique().to(u.device)  # in units of 1 / (n m)
    share = cuts.diff().to(u.dtype) / (n * m)
    return share @ (u[cuts[:-1] // m] - v[cuts[:-1] // n]).square()


def shrink(
    weight: Float[Tensor, " d"], bias: Float[Tensor, " d"], lasso: float, group: float
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """The proximal step of a sparse group lasso: every number moves `lasso` towards zero, and then each of the two vectors
    shrinks by `group * sqrt(d)` of its norm; what would cross zero is exactly zero."""

    def one(x: Tensor) -> Tensor:
        x = torch.sign(x) * (x.abs() - lasso).clamp_min(0)
        norm = x.norm()
        return x * (1 - group * len(x) ** 0.5 / norm.clamp_min(torch.finfo(x.dtype).tiny)).clamp_min(0)

    return one(weight), one(bias)
