"""`encode_threshold`: every pre-activation strictly above a threshold (0 for ReLU), with sparse gradients.

As in `encode_topk`, a dense product finds the candidates (all that lie above the threshold less the rounding bound), and
the pair-wise value decides and is kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.encode_topk import _CHUNK_ELEMENTS, gemm_error
from saelab.kernels.sampled_product import sampled_product
from saelab.kernels.selected_pre_acts import selected_pre_acts
from saelab.kernels.sparse_acts import SparseActs, offsets_of


def encode_threshold(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: float = 0.0,
) -> SparseActs:
    """`u = x @ W_enc.T + b_enc`, keep `u` where `u > threshold` (`threshold >= 0`; 0 is the plain ReLU).

    Differentiable in `x`, `W_enc` and `b_enc` through the kept values. Batch-independent, bit for bit.
    """
    with torch.no_grad():
        values, features, counts = _select(x.detach(), W_enc.detach(), b_enc.detach(), threshold)
        acts = SparseActs(values, features, offsets_of(counts), W_enc.shape[0])
    return selected_pre_acts(x, W_enc, b_enc, acts)


def _select(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = max(1, _CHUNK_ELEMENTS // W_enc.shape[0])
    floor = threshold - 2 * gemm_error(x, W_enc, b_enc)
    parts = [
        _select_chunk(chunk, W_enc, b_enc, threshold, low)
        for chunk, low in zip(x.split(rows), floor.split(rows), strict=True)
    ]
    values, features, counts = (torch.cat(column) for column in zip(*parts, strict=True))
    return values, features, counts


def _select_chunk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: float, floor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    near = torch.addmm(b_enc, x, W_enc.T) > floor[:, None]  # (batch, d_sae), for finding only
    rows, features = near.nonzero(as_tuple=True)
    exact = sampled_product(x, W_enc, features, offsets_of(near.sum(1))) + b_enc[features]
    above = exact > threshold
    return exact[above], features[above], torch.bincount(rows[above], minlength=x.shape[0])
