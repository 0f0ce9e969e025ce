"""Selection among the candidates: exact fp32 values, the k largest of each row, and which rows are not certain.

A value is the sum of partial sums over column tiles, each by the same arithmetic whatever else is in the batch. The k-th
largest (score, lowest id first) is found by sorting unique 64-bit keys; what reaches it is kept in ascending order of ids. A
row is certain if its k-th score is at least the bound on every pair that was no candidate, and no candidate was left out.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.launch import launch
from saelab.kernels.triton_backend.step.candidates import Slots, ordered
from saelab.kernels.triton_backend.step.products import pair_products


class Selection(NamedTuple):
    """The pairs that are kept: k slots a row, feature ids ascending, then empty slots of value 0 and feature 0."""

    values: Float[Tensor, "batch k"]
    features: Int[Tensor, "batch k"]
    counts: Int[Tensor, " batch"]
    keys: Int[Tensor, "batch k"]
    """The features, but `d_sae` in empty slots: sorted, the pairs of each feature lie together and the empty slots last."""


class Scoring(NamedTuple):
    """By what the pairs of a row are ranked: their values, magnitudes, or values times `norms`, one for each feature."""

    norms: Float[Tensor, " d_sae"] | None = None
    magnitude: bool = False


VALUES = Scoring()


class Uncertain(NamedTuple):
    """The rows that have to be selected again."""

    rows: Int[Tensor, " batch"]
    count: Int[Tensor, " 1"]


@triton.jit
@no_type_check
def score_of(value, feature, real, norms_ptr, MAGNITUDE: tl.constexpr):
    """What pairs are ranked by (`Scoring`)."""
    if norms_ptr is not None:
        value *= tl.load(norms_ptr + feature, mask=real, other=0.0)
    if MAGNITUDE:
        value = tl.maximum(value, -value)
    return value


@triton.jit
@no_type_check
def key_of(scores, features):
    """One integer by which pairs are ranked: the score, then the lower id. No two pairs of a row have the same."""
    return (ordered(scores).to(tl.int64) << 32) | (0x7FFFFFFF - features).to(tl.int64)


@triton.jit
@no_type_check
def score_of_key(keys):
    bits = (keys >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n_pairs", "n_tiles", "k", "d_sae"])
@no_type_check
def _select_kernel(
    partials_ptr, features_ptr, counts_ptr, bounds_ptr, rough_ptr, bias_ptr, norms_ptr, values_ptr, kept_ptr, n_kept_ptr,
    keys_ptr, uncertain_ptr, n_uncertain_ptr, n_pairs, n_tiles, k, d_sae, MAGNITUDE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    count = tl.load(counts_ptr + row)
    real = slot < count
    feature = tl.load(features_ptr + row * SLOTS + slot, mask=real, other=0)
    value = tl.zeros([SLOTS], tl.float32)
    for _ in range(0, n_tiles):
        value += tl.load(partials_ptr + row * SLOTS + slot, mask=real, other=0.0)
        partials_ptr += n_pairs
    value += tl.load(bias_ptr + feature, mask=real, other=0.0)
    score = score_of(value, feature, real, norms_ptr, MAGNITUDE)
    if rough_ptr is not None:
        rough = tl.load(rough_ptr + row * SLOTS + slot, mask=real, other=0.0)
        value = tl.where(rough == rough, rough, value)
        score = tl.where(rough == rough, 3e38, value)  # surely among the k largest
    key = tl.where(real & (score > 0), key_of(score, feature), -1)  # keys of positive scores are not negative
    kth_key = tl.sum(tl.where(slot == k - 1, tl.sort(key, descending=True), 0), axis=0)
    kept = (key >= kth_key) & (key >= 0)
    n_kept = tl.sum(kept.to(tl.int32), axis=0)
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(values_ptr + row * k + place, value, mask=kept)
    tl.store(kept_ptr + row * k + place, feature, mask=kept)
    tl.store(keys_ptr + row * k + place, feature, mask=kept)
    empty = (slot >= n_kept) & (slot < k)
    tl.store(values_ptr + row * k + slot, tl.zeros([SLOTS], tl.float32), mask=empty)
    tl.store(kept_ptr + row * k + slot, tl.zeros([SLOTS], tl.int32), mask=empty)
    tl.store(keys_ptr + row * k + slot, tl.zeros([SLOTS], tl.int32) + d_sae, mask=empty)
    tl.store(n_kept_ptr + row, n_kept)
    kth = tl.where(kth_key >= 0, score_of_key(kth_key), 0.0)
    certain = (tl.load(bounds_ptr + row) <= kth) & (count <= SLOTS)
    if not certain:
        tl.store(uncertain_ptr + tl.atomic_add(n_uncertain_ptr, 1), row.to(tl.int32))


def select(
    x: Tensor, W: Tensor, bias: Tensor, found: Slots, out: Selection, uncertain: Uncertain, scoring: Scoring = VALUES
) -> None:
    """Fill `out` with the k best candidates of each row and `uncertain` with the rows that they may be wrong for."""
    rough = found.rough
    chosen, counts = (None, found.counts) if rough is None else (rough.open_slots, rough.n_open)
    partials = pair_products(x, W, found.features, counts, chosen)
    n_tiles, n_pairs = partials.shape
    n_slots, k = found.features.shape[1], out.values.shape[1]
    operands = (
        partials,
        *found[:3],
        None if rough is None else rough.values,
        bias,
        scoring.norms,
        *out,
        *uncertain,
        n_pairs,
        n_tiles,
        k,
        W.shape[0],
    )
    launch(_select_kernel, (x.shape[0],), *operands, MAGNITUDE=scoring.magnitude, SLOTS=n_slots, num_warps=4)


def empty_selection(n_rows: int, k: int, device: torch.device) -> tuple[Selection, Uncertain]:
    """Room for a selection of `n_rows` rows."""
    ints = torch.zeros(2, n_rows, k, dtype=torch.int32, device=device)
    counts = torch.zeros(2, n_rows, dtype=torch.int32, device=device)
    values = torch.zeros(n_rows, k, dtype=torch.float32, device=device)
    uncertain = Uncertain(counts[1], torch.zeros(1, dtype=torch.int32, device=device))
    return Selection(values, ints[0], counts[0], ints[1]), uncertain
