"""`encode_threshold`: every pre-activation strictly above a threshold. Used by ReLU (0), JumpReLU, and BatchTopK at inference.

As in `encode_topk`, a screen finds the candidates, and the value recomputed pair by pair decides and is returned. The
floor is known from the start, so every row is certified.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.candidates import build_operands, find_candidates
from saelab.kernels.dispatch import backend_name
from saelab.kernels.precision import widened
from saelab.kernels.primitives import sddmm
from saelab.kernels.ragged import count_before, flatnonzero
from saelab.kernels.reference.encode_threshold import encode_threshold as encode_threshold_reference
from saelab.kernels.search import TINY
from saelab.kernels.selected_pre_acts import selected_pre_acts
from saelab.kernels.selection_log import note_selection
from saelab.kernels.sparse_acts import SparseActs


def encode_threshold(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: float | Float[Tensor, ""] | Float[Tensor, " d_sae"] = 0.0,
    band: float = 0.0,
    center: Float[Tensor, " d_in"] | None = None,
) -> SparseActs:
    """`u = (x - center) @ W_enc.T + b_enc`; keep `u` where `u > threshold - band` (one threshold, or one per feature).

    A `band` of half the bandwidth of a straight-through estimator also keeps the pairs just below the threshold, which
    its gradient reaches (`jump_relu`). Differentiable with respect to `x`, `W_enc`, `b_enc` and `center` through the kept
    values. Zeros are not stored. A row's result is bit-identical whether it is encoded alone or in a batch.
    """
    x, W_enc, b_enc, center = widened(x, W_enc, b_enc, center)
    if backend_name(x) == "reference":
        return SparseActs.from_dense(encode_threshold_reference(x, W_enc, b_enc, threshold, band, center))
    with torch.no_grad():
        centered = x if center is None else x - center
        floor = torch.as_tensor(threshold, dtype=x.dtype, device=x.device).detach() - band
        feature_acts = _select(centered.detach(), W_enc.detach(), b_enc.detach(), floor)
    return selected_pre_acts(x, W_enc, b_enc, feature_acts, center, centered)


def _select(x: Tensor, W: Tensor, bias: Tensor, floor: Tensor) -> SparseActs:
    reachable = floor.expand(len(bias)) < torch.inf
    if not bool(reachable.all()):  # an infinite threshold would make the error bounds of all features infinite
        features = flatnonzero(reachable)
        if not len(features):
            return SparseActs(x.new_zeros(0), features, features.new_zeros(len(x) + 1), W.shape[0])
        feature_acts = _select(x, W[features], bias[features], floor if floor.ndim == 0 else floor[features])
        return SparseActs(feature_acts.values, features[feature_acts.features], feature_acts.offsets, W.shape[0])
    operands = build_operands(x, W, bias - floor)
    found = find_candidates(operands, lambda screen, rows: screen.pairs_above(TINY - operands.error_bound[rows]))
    values = sddmm(x, W, found.features, found.offsets) + bias[found.features]
    above = values > (floor if floor.ndim == 0 else floor[found.features])
    kept = flatnonzero(above & (values != 0))
    note_selection(len(x), len(values), len(x))
    return SparseActs(values[kept], found.features[kept], count_before(kept, found.offsets), W.shape[0])
