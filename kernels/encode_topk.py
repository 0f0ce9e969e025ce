"""`encode_topk`: the k largest pre-activations of each row, selected exactly.

A screen finds candidates (`candidates.py`), their values are recomputed pair by pair (`sddmm`), and the selection is made
among those. A row is certified when its k-th value is at least the upper bound of every other pair. The few uncertified
rows are screened again with that k-th value as the floor, which cannot miss a pair. Ties go to the lowest feature id.
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
    """`u = (x - center) @ W_enc.T + b_enc`; for each row keep the k pairs with the largest score, if positive.

    The score is `u` ("value": Gao et al. 2024, eq. 1, with ReLU), `|u|` ("magnitude"; the stored value keeps its sign) or
    `u` times `norms`, the decoder's row norms ("decoder_norm"). Differentiable with respect to `x`, `W_enc`, `b_enc` and
    `center` through the kept values. A row's result is bit-identical whether it is encoded alone or in a batch. Raises
    `ValueError` for an unknown score, and for `norms` that do not match it.
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
    """Raise `ValueError` for an unknown score, and for `norms` without "decoder_norm" or the reverse."""
    if score not in SCORES:
        raise ValueError(f"score={score!r} must be one of {', '.join(SCORES)}.")
    if (norms is None) == (score == "decoder_norm"):
        raise ValueError(f"score={score!r}: `norms` must be given with score='decoder_norm', and only with it.")


def _select(x: Tensor, W: Tensor, bias: Tensor, k: int, score: str, norms: Tensor | None) -> SparseActs:
    W_score, bias_score = (W, bias) if norms is None else (W * norms[:, None], bias * norms)
    operands = build_operands(x, W_score, bias_score, score == "magnitude")
    search = partial(find_candidates, magnitude=score == "magnitude", min_groups=k)
    keep = partial(_keep, W=W, bias=bias, k=k, score=score, norms=norms)
    found = search(operands, lambda screen, rows: screen.best_pairs(k, operands.margin[rows]))
    feature_acts, kth = keep(found, x)
    uncertified = flatnonzero(~found.completes(kth))
    n_candidates = found.features.numel()
    if len(uncertified):  # their k-th value is a lower bound on the true one: as a floor it misses no pair
        retried = operands.select_rows(uncertified)
        found = search(
            retried, lambda screen, rows: screen.pairs_above(kth[uncertified][rows] - retried.error_bound[rows])
        )
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
    """The best k candidates of each row by exact value, and the k-th score (0 where fewer are positive)."""
    values = sddmm(x, W, found.features, found.offsets) + bias[found.features]
    kept, kth = keep_largest(score_of(values, found.features, score, norms), found.offsets, k)
    return SparseActs(values[kept], found.features[kept], count_before(kept, found.offsets), W.shape[0]), kth


def score_of(values: Tensor, features: Tensor, score: str, norms: Tensor | None) -> Tensor:
    """The score by which pairs are ranked."""
    if norms is not None:
        return values * norms[features]
    return values.abs() if score == "magnitude" else values
