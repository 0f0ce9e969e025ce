"""The k most similar codes of each row, whatever their similarity; a row's result is independent of its batch.

`encode_topk` keeps positive scores, so rows are scaled to norm 1 and codes to norm at most 1: then every score plus 2 is
positive. Neither changes the order. For distances, `-|a - c|^2 / 2 = a . c - |c|^2 / 2 + const`, with the second term in
an extra column.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.primitives import unit_norm_

_SHIFT = 2.0


@torch.no_grad()
def most_similar(
    x: Float[Tensor, "n d"],
    codes: Float[Tensor, "n_codes d"],
    k: int,
    similarity: str = "inner_product",
    blocked: Bool[Tensor, " n_codes"] | None = None,
) -> Int[Tensor, "n k"]:
    """Ids of the k most similar codes, ascending; ties go to the lowest id. `blocked` codes are never chosen.

    Raises `ValueError` when fewer than k codes are left.
    """
    codes = codes.detach()
    shift = codes.new_full((len(codes),), _SHIFT)
    if similarity == "euclidean":
        x, codes = _with_lengths(x, codes)
        codes = codes / codes.norm(dim=1).max().clamp_min(torch.finfo(codes.dtype).tiny)
    else:
        codes = normalize(codes, dim=1)
    if blocked is not None:
        if int((~blocked).sum()) < k:
            raise ValueError(f"{int(blocked.sum())} of {len(codes)} codes are blocked: fewer than k={k} are left.")
        codes, shift = codes * ~blocked[:, None], shift * ~blocked
    rows = x.contiguous().clone()
    unit_norm_(rows)  # not torch's normalize: on a GPU its order of summation depends on the batch size
    rows = rows.nan_to_num()  # non-finite rows get arbitrary codes; the loss then is not finite
    return encode_topk(rows, codes, shift, k).features.view(len(x), k)


def _with_lengths(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `(a, s)` and `(c, -|c|^2 / 2s)`; s, the codes' root-mean-square norm, keeps both parts at the same scale."""
    squares = codes.square().sum(1)
    size = squares.mean().sqrt().clamp_min(torch.finfo(codes.dtype).tiny)
    return torch.cat([x, size.expand(len(x), 1)], 1), torch.cat([codes, (-squares / (2 * size))[:, None]], 1)
