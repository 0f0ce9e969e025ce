"""`encode_groupmax`: the largest pre-activation of each of k consecutive groups of features, by `encode_topk`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.sparse_acts import SparseActs, join_features


def encode_groupmax(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    norms: Float[Tensor, " d_sae"] | None = None,
    center: Float[Tensor, " d_in"] | None = None,
) -> SparseActs:
    """`u = (x - center) @ W_enc.T + b_enc`; of each of `k` groups of `d_sae / k` features keep the largest u, where positive.

    With `norms` the largest of `u * norms`. Ties go to the lowest feature id. Differentiable as `encode_topk`,
    and a row's result is bit-identical whether it is encoded alone or in a batch. `k` must divide `d_sae`.
    """
    size = len(W_enc) // k
    score = "value" if norms is None else "decoder_norm"
    each = [None] * k if norms is None else norms.split(size)
    groups = zip(W_enc.split(size), b_enc.split(size), each, strict=True)
    return join_features([encode_topk(x, W, b, 1, score, n, center) for W, b, n in groups])
