"""`encode_batch_topk`: the `n_kept` largest pre-activations of a whole batch (BatchTopK, Mutual Choice).

The same steps as `encode_topk`, with one floor for all rows: the `n_kept`-th largest of the batch's group maxima is a
lower bound on its `n_kept`-th best score. When the batch is spread over ranks, each rank uses its share of `n_kept` to
find a floor, and all of them use the lowest.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.candidates import build_operands, find_candidates, screens
from saelab.kernels.dispatch import backend_name
from saelab.kernels.encode_topk import check_score, score_of
from saelab.kernels.precision import widened
from saelab.kernels.primitives import sddmm
from saelab.kernels.ragged import count_before, keep_largest, kth_largest
from saelab.kernels.reference.encode_batch_topk import encode_batch_topk as encode_batch_topk_reference
from saelab.kernels.search import Candidates
from saelab.kernels.selected_pre_acts import selected_pre_acts
from saelab.kernels.selection_log import note_selection
from saelab.kernels.sparse_acts import SparseActs


@runtime_checkable
class GlobalPairs(Protocol):
    """The (row, feature) pairs of several ranks (`saelab.distributed.global_topk`)."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def all_reduce_min(self, x: Tensor) -> Tensor:
        """Elementwise minimum over the ranks."""
        ...

    def every(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on every rank."""
        ...

    def keep(
        self, scores: Float[Tensor, " m"], rows: Int[Tensor, " m"], features: Int[Tensor, " m"], n: int
    ) -> tuple[Int[Tensor, " kept"], Float[Tensor, " 1"]]:
        """Positions of this rank's scores that are among the n best of all ranks, and the n-th best score."""
        ...


def encode_batch_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    n_kept: int,
    score: str = "value",
    norms: Float[Tensor, " d_sae"] | None = None,
    center: Float[Tensor, " d_in"] | None = None,
    global_pairs: GlobalPairs | None = None,
) -> SparseActs:
    """`u = (x - center) @ W_enc.T + b_enc`; keep the `n_kept` pairs of the batch with the largest score, if positive
    (Bussmann et al. 2024, "BatchTopK", eq. 4; Mutual Choice of Ayonrinde 2024). Scores are as in `encode_topk`.

    Ties at the last place go to the earlier row, then to the lower feature id. Differentiable through the kept values.
    With `global_pairs` the batch is that of all ranks, and the kept pairs of this rank are returned. Raises `ValueError`
    for an unknown score, for `norms` that do not match it, and (without `global_pairs`) for an `n_kept` out of range.
    """
    check_score(score, norms)
    if global_pairs is None and not 0 <= n_kept <= x.shape[0] * W_enc.shape[0]:
        raise ValueError(f"n_kept={n_kept} must be between 0 and batch * d_sae = {x.shape[0] * W_enc.shape[0]}.")
    x, W_enc, b_enc, norms, center = widened(x, W_enc, b_enc, norms, center)
    if backend_name(x) == "reference":
        feature_acts = SparseActs.from_dense(encode_batch_topk_reference(x, W_enc, b_enc, n_kept, score, norms, center))
        return feature_acts if global_pairs is None else _among(feature_acts, n_kept, score, norms, global_pairs)
    with torch.no_grad():
        centered = x if center is None else x - center
        feature_acts = _select(centered.detach(), W_enc.detach(), b_enc.detach(), n_kept, score, norms, global_pairs)
    return selected_pre_acts(x, W_enc, b_enc, feature_acts, center, centered)


def _among(
    feature_acts: SparseActs, n_kept: int, score: str, norms: Tensor | None, global_pairs: GlobalPairs
) -> SparseActs:
    """The entries of `feature_acts`, this rank's best, that are also among the best of all ranks."""
    scores = score_of(feature_acts.values.detach(), feature_acts.features, score, norms)
    kept = torch.zeros(feature_acts.nnz, dtype=torch.bool, device=scores.device)
    kept[global_pairs.keep(scores, feature_acts.rows, feature_acts.features, n_kept)[0]] = True
    return feature_acts.where(kept)


def _select(
    x: Tensor, W: Tensor, bias: Tensor, n_kept: int, score: str, norms: Tensor | None, global_pairs: GlobalPairs | None
) -> SparseActs:
    W_score, bias_score = (W, bias) if norms is None else (W * norms[:, None], bias * norms)
    n_here = n_kept if global_pairs is None else min(-(-n_kept // global_pairs.size), len(x) * len(W))
    magnitude, min_groups = score == "magnitude", -(-n_here // max(len(x), 1)) or 1
    operands = build_operands(x, W_score, bias_score, magnitude)
    keep = partial(_keep, x=x, W=W, bias=bias, n_kept=n_kept, score=score, norms=norms, global_pairs=global_pairs)
    best = torch.cat([screen.maxima.reshape(-1) for _, screen in screens(operands, magnitude, min_groups)])
    last = kth_largest(best[None], n_here) if 0 < n_here <= len(best) else best.new_zeros(1)
    floor = last - (operands.margin.max() if len(x) else 0)
    floor = floor if global_pairs is None else global_pairs.all_reduce_min(floor)
    search = partial(find_candidates, operands, magnitude=magnitude, min_groups=min_groups)
    found = search(lambda screen, rows: screen.pairs_above(floor - operands.error_bound[rows]))
    feature_acts, kth = keep(found)
    n_candidates, certified = found.features.numel(), bool(found.completes(kth).all())
    certified = certified if global_pairs is None else global_pairs.every(certified, x.device)
    if not certified:  # this n-th score is a lower bound on the true one: as a floor it cannot miss a pair
        found = search(lambda screen, rows: screen.pairs_above(kth - operands.error_bound[rows]))
        feature_acts, n_candidates = keep(found)[0], n_candidates + found.features.numel()
    note_selection(len(x), n_candidates, len(x) * certified)
    return feature_acts


def _keep(
    found: Candidates,
    x: Tensor,
    W: Tensor,
    bias: Tensor,
    n_kept: int,
    score: str,
    norms: Tensor | None,
    global_pairs: GlobalPairs | None,
) -> tuple[SparseActs, Tensor]:
    """The best `n_kept` candidates by exact value, and the `n_kept`-th score `(1)`: 0 if fewer are positive."""
    values = sddmm(x, W, found.features, found.offsets) + bias[found.features]
    scores = score_of(values, found.features, score, norms)
    if global_pairs is None:
        kept, kth = keep_largest(scores, torch.tensor([0, len(values)], device=x.device), n_kept)
    else:
        rows = torch.repeat_interleave(found.offsets.diff(), output_size=len(values))
        kept, kth = global_pairs.keep(scores, rows, found.features, n_kept)
    return SparseActs(values[kept], found.features[kept], count_before(kept, found.offsets), W.shape[0]), kth
