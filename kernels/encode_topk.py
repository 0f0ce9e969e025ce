"""`encode_topk`: the k best pre-activations of each row, exactly.

A screen finds candidates (`candidates.py`), their values are computed anew pair by pair (`sddmm`), and the
selection is made among those. A row is certified when its k-th value is not under the bound of all other pairs. The
few others are screened again with that k-th value as the floor: then nothing can be missed. Ties go to the lowest id.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.candidates import build_operands, find_candidates
from saelab.kernels.dispatch import backend_name
from saelab.kernels.precision import widened
from saelab.kernels.primitives import sddmm
from saelab.kernels.ragged import count_before, flatnonzero, keep_largest
from saelab.kernels.reference.encode_topk import encode_topk as encode_topk_reference
from saelab.kernels.search import Candidates
from saelab.kernels.selected_pre_acts import selected_pre_acts
from saelab.kernels.selection_log import note_selection
from saelab.kernels.sparse_acts import SparseActs, replace_rows

SCORES = ("value", "magnitude", "decoder_norm")


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    score: str = "value",
    norms: Float[Tensor, " d_sae"] | None = None,
    center: Float[Tensor, " d_in"] | None = None,
) -> SparseActs:
    """`u = (x - center) @ W_enc.T + b_enc`; of each row keep the k pairs of largest score, if positive (zeros are not stored).

    The score is `u` ("value": Gao et al. 2024, eq. 1, ReLU included), `|u|` ("magnitude", the sign is kept) or `u`
    times `norms`, which then holds the decoder's row norms ("decoder_norm"). Differentiable in `x`, `W_enc`,
    `b_enc` and `center` through the kept values. A row's code is the same alone and in any batch, bit for bit.
    """
    check_score(score, norms)
    x, W_enc, b_enc, norms, center = widened(x, W_enc, b_enc, norms, center)
    if backend_name(x) == "reference":
        return SparseActs.from_dense(encode_topk_reference(x, W_enc, b_enc, k, score, norms, center))
    with torch.no_grad():
        centered = x if center is None else x - center
        feature_acts = _select(centered.detach(), W_enc.detach(), b_enc.detach(), k, score, norms)
    return selected_pre_acts(x, W_enc, b_enc, feature_acts, center, centered)


def check_score(score: str, norms: Tensor | None) -> None:
    """Raises `ValueError` for an unknown score or norms that are missing."""
    if score not in SCORES:
        raise ValueError(f"score={score!r} must be one of {', '.join(SCORES)}.")
    if (norms is None) == (score == "decoder_norm"):
        raise ValueError(f"score={score!r}: give `norms` with 'decoder_norm', and only then.")


def _select(x: Tensor, W: Tensor, bias: Tensor, k: int, score: str, norms: Tensor | None) -> SparseActs:
    W_score, bias_score = (W, bias) if norms is None else (W * norms[:, None], bias * norms)
    operands = build_operands(x, W_score, bias_score, score == "magnitude")
    search = partial(find_candidates, magnitude=score == "magnitude", min_groups=k)
    keep = partial(_keep, W=W, bias=bias, k=k, score=score, norms=norms)
    found = search(operands, lambda screen, rows: screen.best_pairs(k, operands.margin[rows]))
    feature_acts, kth = keep(found, x)
    uncertified = flatnonzero(~found.completes(kth))
    n_candidates = found.features.numel()
    if len(uncertified):  # what was found for them is a lower bound of the best k: now the floor is exact
        part = operands.select_rows(uncertified)
        found = search(part, lambda screen, rows: screen.pairs_above(kth[uncertified][rows] - part.error_bound[rows]))
        again, _ = keep(found, x[uncertified])
        feature_acts, n_candidates = (
            replace_rows(feature_acts, uncertified, again),
            n_candidates + found.features.numel(),
        )
    note_selection(len(x), n_candidates, len(x) - len(uncertified))
    return feature_acts


def _keep(
    found: Candidates, x: Tensor, W: Tensor, bias: Tensor, k: int, score: str, norms: Tensor | None
) -> tuple[SparseActs, Tensor]:
    """The best k candidates of each row by their exact values, and the k-th score (0 where fewer are positive)."""
    values = sddmm(x, W, found.features, found.offsets) + bias[found.features]
    kept, kth = keep_largest(score_of(values, found.features, score, norms), found.offsets, k)
    return SparseActs(values[kept], found.features[kept], count_before(kept, found.offsets), W.shape[0]), kth


def score_of(values: Tensor, features: Tensor, score: str, norms: Tensor | None) -> Tensor:
    """What pairs are ranked by."""
    if norms is not None:
        return values * norms[features]
    return values.abs() if score == "magnitude" else values
