"""`encode_feature_topk`: for every feature, the tokens of the batch on which it is strongest (Feature Choice).

`encode_topk` with rows and columns exchanged: the rows of the screen are features, its columns are tokens, and each
feature has its own capacity.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.candidates import build_operands, find_candidates
from saelab.kernels.dispatch import backend_name
from saelab.kernels.precision import widened
from saelab.kernels.primitives import sddmm
from saelab.kernels.ragged import flatnonzero, keep_largest, stable_argsort
from saelab.kernels.reference.encode_feature_topk import encode_feature_topk as encode_feature_topk_reference
from saelab.kernels.search import Candidates
from saelab.kernels.selected_pre_acts import selected_pre_acts
from saelab.kernels.selection_log import note_selection
from saelab.kernels.sparse_acts import SparseActs, offsets_of


def encode_feature_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    capacity: Int[Tensor, " d_sae"],
    center: Float[Tensor, " d_in"] | None = None,
) -> SparseActs:
    """`u = (x - center) @ W_enc.T + b_enc`; feature i keeps its `capacity[i]` largest `u` over the batch, if positive
    (Ayonrinde 2024, arXiv 2411.02124, Feature Choice). Ties go to the earlier token. Differentiable like `encode_topk`.

    Raises `ValueError` for a capacity below 0 or above the batch size.
    """
    if int(capacity.min()) < 0 or int(capacity.max()) > len(x):
        raise ValueError(
            f"capacity ranges from {int(capacity.min())} to {int(capacity.max())}; it must be between 0 and batch={len(x)}."
        )
    x, W_enc, b_enc, center = widened(x, W_enc, b_enc, center)
    if backend_name(x) == "reference":
        return SparseActs.from_dense(encode_feature_topk_reference(x, W_enc, b_enc, capacity, center))
    with torch.no_grad():
        centered = x if center is None else x - center
        feature_acts = _select(centered.detach(), W_enc.detach(), b_enc.detach(), capacity)
    return selected_pre_acts(x, W_enc, b_enc, feature_acts, center, centered)


def _select(x: Tensor, W: Tensor, bias: Tensor, capacity: Tensor) -> SparseActs:
    if not len(x):
        return SparseActs(x.new_zeros(0), capacity.new_zeros(0), capacity.new_zeros(1), W.shape[0])
    operands = build_operands(x, W, bias).transposed()  # rows are features, columns tokens
    search = partial(find_candidates, min_groups=max(int(capacity.max()), 1))
    found = search(operands, lambda screen, rows: _best_pairs(screen, capacity[rows], operands.margin[rows]))
    features, tokens, values, kth = _keep(found, x, W, bias, capacity)
    certified = found.completes(kth) | (capacity == 0)
    uncertified, n_candidates = flatnonzero(~certified), found.features.numel()
    if len(uncertified):  # their last kept value is a lower bound: as a floor it misses no pair
        retried = operands.select_rows(uncertified)
        found = search(
            retried, lambda screen, rows: screen.pairs_above(kth[uncertified][rows] - retried.error_bound[rows])
        )
        again = _keep(found, x, W[uncertified], bias[uncertified], capacity[uncertified])
        stay = certified[features]
        features = torch.cat([features[stay], uncertified[again[0]]])
        tokens, values = torch.cat([tokens[stay], again[1]]), torch.cat([values[stay], again[2]])
        n_candidates += found.features.numel()
    note_selection(W.shape[0], n_candidates, W.shape[0] - len(uncertified))
    order = stable_argsort(tokens * W.shape[0] + features)
    return SparseActs(values[order], features[order], offsets_of(torch.bincount(tokens, minlength=len(x))), W.shape[0])


def _keep(
    found: Candidates, x: Tensor, W: Tensor, bias: Tensor, capacity: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, tokens and exact values of the kept pairs, and each feature's last kept value (0 if capacity is left over)."""
    features = torch.repeat_interleave(found.offsets.diff(), output_size=found.features.numel())
    values = sddmm(W, x, found.features, found.offsets) + bias[features]
    kept, kth = keep_largest(values, found.offsets, capacity)
    return features[kept], found.features[kept], values[kept], kth


def _best_pairs(screen: Any, capacity: Tensor, margin: Tensor) -> Candidates:
    """Pairs at most `margin` below each row's `capacity`-th largest group maximum; none for a row of capacity 0."""
    ranked = screen.maxima.sort(dim=1, descending=True).values
    kth = ranked.gather(1, (capacity[:, None] - 1).clamp_min(0)).squeeze(1)
    return screen.pairs_above((kth - margin).masked_fill(capacity == 0, torch.inf))
