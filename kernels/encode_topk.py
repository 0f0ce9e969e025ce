"""`encode_topk`: the k largest pre-activations of each row, exactly, ReLU applied.

A dense product finds k + margin candidates; their values are computed anew pair by pair (`sampled_product`) and the
selection is made among those. A rounding bound certifies each row: nothing outside its candidates can belong to the
top k. Rows without the certificate are selected among all features. Ties go to the lowest feature id.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.sampled_product import sampled_product
from saelab.kernels.selected_pre_acts import selected_pre_acts
from saelab.kernels.sparse_acts import SparseActs

MARGIN = 8
_CHUNK_ELEMENTS = 1 << 24


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> SparseActs:
    """`u = x @ W_enc.T + b_enc`, keep each row's k largest, then ReLU (Gao et al. 2024, eq. 1; zeros are not stored).

    Differentiable in `x`, `W_enc` and `b_enc` through the kept values. Batch-independent, bit for bit.
    """
    with torch.no_grad():
        values, features = _select(x.detach(), W_enc.detach(), b_enc.detach(), k)
        acts = SparseActs.from_top(values.relu(), features, W_enc.shape[0])
    return selected_pre_acts(x, W_enc, b_enc, acts)


def _select(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and ids `(batch, k)` of the top k, ids ascending; in chunks of rows, so that memory stays bounded."""
    rows = max(1, _CHUNK_ELEMENTS // W_enc.shape[0])
    reach = 2 * gemm_error(x, W_enc, b_enc)  # the dense product's rounding and the pair-wise one's
    parts = [
        _select_chunk(chunk, W_enc, b_enc, k, bound)
        for chunk, bound in zip(x.split(rows), reach.split(rows), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _select_chunk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, reach: Tensor) -> tuple[Tensor, Tensor]:
    d_sae = W_enc.shape[0]
    n_candidates = min(k + MARGIN, d_sae)
    scores = torch.addmm(b_enc, x, W_enc.T)  # (batch, d_sae), for finding only
    found = scores.topk(n_candidates, dim=1)
    values, features = _best_of(x, W_enc, b_enc, found.indices.sort(dim=1).values, k)
    if n_candidates < d_sae:
        outside = found.values[:, -1] + reach  # no feature outside the candidates is above this
        uncertain = ~((outside < values.min(dim=1).values) | (outside <= 0))
        if uncertain.any():
            everything = torch.arange(d_sae, device=x.device).expand(int(uncertain.sum()), -1)
            values[uncertain], features[uncertain] = _best_of(x[uncertain], W_enc, b_enc, everything, k)
    return values, features


def _best_of(x: Tensor, W_enc: Tensor, b_enc: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the `candidates (batch, n)`, whose ids ascend in each row, by their pair-wise values."""
    batch, n = candidates.shape
    offsets = torch.arange(0, batch * n + 1, n, device=x.device)
    exact = sampled_product(x, W_enc, candidates.reshape(-1), offsets).view(batch, n) + b_enc[candidates]
    best = exact.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return exact.gather(1, best), candidates.gather(1, best)


def gemm_error(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Float[Tensor, " batch"]:
    """How far a computed pre-activation may lie from its true value: `gamma_n (|x| |w| + |b|)`, Higham 2002, eq. 3.5."""
    unit = torch.finfo(x.dtype).eps / 2
    terms = x.shape[1] + 1
    gamma = terms * unit / (1 - terms * unit)
    largest = torch.linalg.vector_norm(W_enc, dim=1).max()
    return gamma * (torch.linalg.vector_norm(x, dim=1) * largest + b_enc.abs().max())
