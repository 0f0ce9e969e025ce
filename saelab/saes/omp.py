"""Orthogonal matching pursuit (Pati et al. 1993): as matching pursuit, but after each step all activations are fitted anew:

    k times:  i = argmax_i |<r, d_i>|,  S += i,  z_S = argmin |x - W_S^T z|^2,  r = x - W_S^T z_S

The chosen rows are made orthonormal one after another (Gram-Schmidt), so that a step takes one component from r, and z follows at
the end by back-substitution. A token stops once its best row lies in the span of those it has.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.precision import widened
from saelab.kernels.primitives import sddmm
from saelab.kernels.ragged import stable_argsort
from saelab.kernels.sparse_acts import SparseActs, offsets_of

SPANNED = 1e-3
"""A row of norm 1 with less than this outside the span of the chosen ones adds nothing but rounding errors."""


@torch.no_grad()
def orthogonal_pursuit(x: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], n_steps: int) -> SparseActs:
    """The feature activations of `x` after `n_steps`; a row's result is independent of the rest of the batch."""
    (W,) = widened(W)
    x, ids = x.to(W), torch.arange(len(x) + 1, device=x.device)
    inner = lambda a, b: sddmm(a, b, ids[:-1], ids)  # noqa: E731
    residual, going = x, torch.ones(len(x), dtype=torch.bool, device=x.device)
    chosen, bases, shares, components = [], [], [], []
    for _ in range(n_steps):
        best = encode_topk(residual, W, W.new_zeros(len(W)), 1, "magnitude")
        feature = ids.new_zeros(len(x))
        feature[best.rows] = best.features
        rest, share = W[feature], []
        for basis in bases:
            share.append(inner(rest, basis))
            rest = rest - share[-1][:, None] * basis
        size = inner(rest, rest).sqrt()
        going = going & (best.counts > 0) & (size > SPANNED)
        if not bool(going.any()):
            break
        basis = torch.where(going[:, None], rest / size.clamp_min(SPANNED)[:, None], 0)
        component = inner(residual, basis)
        residual = residual - component[:, None] * basis
        chosen.append(torch.where(going, feature, -1))
        bases.append(basis)
        shares.append([*share, size])
        components.append(component)
    values: list[Tensor] = []
    for t in reversed(range(len(chosen))):  # component t = sum over u >= t of z_u <row u, basis t>
        left = components[t]
        for u, value in zip(range(len(chosen) - 1, t, -1), values, strict=True):
            left = left - value * shares[u][t]
        values.append(torch.where(chosen[t] >= 0, left / shares[t][t].clamp_min(SPANNED), 0))
    return _as_sparse(chosen, values[::-1], len(x), W)


def _as_sparse(chosen: list[Tensor], values: list[Tensor], batch: int, W: Tensor) -> SparseActs:
    """The values of each step, by row and in order of features."""
    none = torch.zeros(0, dtype=torch.int64, device=W.device)
    features = torch.cat([none, *chosen])
    rows = torch.arange(batch, device=W.device).repeat(len(chosen))
    flat = torch.cat([W.new_zeros(0), *values])
    kept = (features >= 0) & (flat != 0)
    rows, features, flat = rows[kept], features[kept], flat[kept]
    order = stable_argsort(rows * len(W) + features)
    return SparseActs(flat[order], features[order], offsets_of(torch.bincount(rows, minlength=batch)), len(W))
