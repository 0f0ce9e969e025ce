"""Absorption of a label's features on single words, after Chanin et al. 2024, "A is for Absorption: Studying Feature Splitting
and Absorption in Sparse Autoencoders" (arXiv 2409.14507), in the form that needs no causal measurement (that of SAEBench).

    p_i = (part of x that feature i writes) . probe / |probe|,    p = x . probe / |probe|

Full absorption: no main feature fires, and the feature with the largest p_i points along the probe and makes up 40 % of p.
Absorption fraction: of what the main features and up to three others write along the probe, the share of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs

FULL_COSINE = 0.025
"""The least cosine of an absorbing feature's decoder row with the probe, for full absorption."""
FRACTION_COSINE = 0.1
"""Likewise, for the absorption fraction."""
SHARE = 0.4
"""The least share of p that absorbing features make up."""
N_ABSORBERS = 3
"""The most features that absorb together."""


class Absorbed(NamedTuple):
    """What was found on each word."""

    full: Bool[Tensor, " n"]
    fraction: Float[Tensor, " n"]
    absorber: Int[Tensor, " n"]
    """The feature with the largest p_i; -1 where none is above 0."""
    positive: Bool[Tensor, " n"]
    """Whether p is above 0; where it is not, nothing counts as absorbed."""


def absorbed(
    feature_acts: SparseActs,
    directions: Float[Tensor, "d_sae d"],
    token_sizes: Float[Tensor, "n 1"],
    x: Float[Tensor, "n d"],
    probe: Float[Tensor, " d"],
    main: Sequence[int],
) -> Absorbed:
    """Absorption on each row of `x`; `directions` is what a feature activation of 1 adds at a token of size 1, in raw units."""
    unit = probe.double() / probe.double().norm()
    along = directions.double() @ unit  # (d_sae,)
    cosines = along / directions.double().norm(dim=1).clamp_min(1e-30)
    projections = feature_acts.to_dense().double() * along * token_sizes.double()  # (n, d_sae): p_i
    total = x.double() @ unit
    is_main = torch.zeros(len(along), dtype=torch.bool)
    is_main[list(main)] = True
    top = projections.max(1)
    silent = ~(feature_acts.to_dense()[:, is_main] != 0).any(1)
    full = silent & (total > 0) & (cosines[top.indices] >= FULL_COSINE) & (top.values >= SHARE * total)
    by_main = projections[:, is_main].sum(1)
    others = torch.where(~is_main & (cosines >= FRACTION_COSINE), projections.clamp_min(0), 0.0)
    by_others = others.topk(min(N_ABSORBERS, len(along)), 1).values.sum(1)
    counted = (total > 0) & (by_main < total) & (by_others >= SHARE * total)
    rest = torch.minimum(by_others, total - by_main)
    fraction = torch.where(by_main <= 0, 1.0, rest / (rest + by_main).clamp_min(1e-30))
    fraction = torch.where(counted, fraction, 0.0)
    return Absorbed(full, fraction, torch.where(top.values > 0, top.indices, -1), total > 0)
