"""`encode_weighted_topk`: the k pre-activations of each row with the largest product of value and weight, a weight per pair.

As in `encode_topk`, a dense product finds candidates. Its error is bounded, so each product of value and weight has a lower and
an upper bound: only pairs whose upper bound reaches the k-th largest lower bound of their row can be kept. Their values
are computed again pair by pair, and the selection is made among those.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.dispatch import backend_name
from saelab.kernels.error_bounds import working_operands
from saelab.kernels.precision import widened
from saelab.kernels.primitives import sddmm
from saelab.kernels.ragged import count_before, flatnonzero, keep_largest, kth_largest
from saelab.kernels.reference.encode_weighted_topk import encode_weighted_topk as encode_weighted_topk_reference
from saelab.kernels.selected_pre_acts import selected_pre_acts
from saelab.kernels.sparse_acts import SparseActs, offsets_of

_PAIRS_AT_ONCE = 1 << 22
"""Pairs of the dense product that are in memory at once, unless one row has more."""


def encode_weighted_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    weights: Float[Tensor, "batch d_sae"],
    center: Float[Tensor, " d_in"] | None = None,
) -> SparseActs:
    """`u = (x - center) @ W_enc.T + b_enc`; for each row keep the k pairs with the largest `u * weights`, if positive.

    `weights` must not be negative; the stored value is u. Differentiable with respect to `x`, `W_enc`, `b_enc` and `center`
    through the kept values. Ties go to the lowest feature id.
    """
    x, W_enc, b_enc, weights, center = widened(x, W_enc, b_enc, weights, center)
    if backend_name(x) == "reference":
        return SparseActs.from_dense(encode_weighted_topk_reference(x, W_enc, b_enc, k, weights, center))
    with torch.no_grad():
        centered = x if center is None else x - center
        feature_acts = _select(centered.detach(), W_enc.detach(), b_enc.detach(), k, weights.detach())
    return selected_pre_acts(x, W_enc, b_enc, feature_acts, center, centered)


def _select(x: Tensor, W: Tensor, bias: Tensor, k: int, weights: Tensor) -> SparseActs:
    error_bound = working_operands(x, W, bias).error_bound
    step = max(1, _PAIRS_AT_ONCE // len(W))
    parts = zip(x.split(step), weights.split(step), error_bound.split(step), strict=True)
    found = [_candidates(*part, W=W, bias=bias, k=k) for part in parts]
    counts, features = (torch.cat(each) for each in zip(*found, strict=True))
    offsets = offsets_of(counts)
    values = sddmm(x, W, features, offsets) + bias[features]
    rows = torch.repeat_interleave(offsets.diff(), output_size=len(features))
    kept, _ = keep_largest(values * weights[rows, features], offsets, k)
    return SparseActs(values[kept], features[kept], count_before(kept, offsets), len(W))


def _candidates(
    x: Tensor, weights: Tensor, error_bound: Tensor, W: Tensor, bias: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """How many pairs of each row can be kept, and their feature ids, ascending."""
    pre_acts, error = torch.addmm(bias, x, W.T), 2 * error_bound[:, None]  # twice: adding it rounds too
    floor = kth_largest((pre_acts - error).mul_(weights), min(k, len(W)))[:, None]
    can = (pre_acts.add_(error).mul_(weights) >= floor) & (pre_acts > 0)
    return can.sum(1), flatnonzero(can) % len(W)
