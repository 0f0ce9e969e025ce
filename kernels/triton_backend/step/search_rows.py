"""Rows that are not certain, selected from all features: exact for any number of them, and gone at once where there is none.

The features are split over programs; each keeps the k best of its share, block by block (the k best of two sorted lists are
the larger of one and the other reversed, elementwise), and one program a row puts the lists together. The values that are
returned are summed as in `products.py`.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl
from torch import Tensor

from saelab.kernels.triton_backend.launch import ceil_div, launch
from saelab.kernels.triton_backend.step.products import COLUMNS
from saelab.kernels.triton_backend.step.select import VALUES, Scoring, Selection, Uncertain, key_of, score_of

_LANES = 8
_MERGE_LANES = 64
_MOST_SPLITS = 64
_TILE = 1024
_WARPS = 2
_PAIRS = 4


class Plan(NamedTuple):
    """How the features are split."""

    n_best: int
    """Entries of a list: the next power of two from k on."""
    split: int
    """Features of a share, a multiple of `n_best`."""
    n_splits: int

    @property
    def row_bytes(self) -> int:
        """Bytes of the lists of one row."""
        return 8 * self.n_splits * self.n_best


@triton.jit(do_not_specialize=["n_splits", "d_sae", "d_in"])
@no_type_check
def _search_rows_kernel(
    x_ptr, W_ptr, bias_ptr, norms_ptr, rows_ptr, n_rows_ptr, lists_ptr, n_splits, d_sae, d_in,
    MAGNITUDE: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr, BEST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    place = tl.arange(0, BEST)
    for at in range(tl.program_id(1), tl.load(n_rows_ptr), LANES):
        row = tl.load(rows_ptr + at).to(tl.int64)
        best = tl.full([BEST], -1, tl.int64)
        for first in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, d_sae), BEST):
            feature = first + place
            real = feature < d_sae
            score = tl.zeros([BEST], tl.float32)
            for start in range(0, d_in, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                inside = columns < d_in
                x = tl.load(x_ptr + row * d_in + columns, mask=inside, other=0.0)
                at_w = feature.to(tl.int64)[:, None] * d_in + columns[None, :]
                score += tl.sum(
                    x[None, :] * tl.load(W_ptr + at_w, mask=real[:, None] & inside[None, :], other=0.0), axis=1
                )
            score += tl.load(bias_ptr + feature, mask=real, other=0.0)
            score = score_of(score, feature, real, norms_ptr, MAGNITUDE)
            key = tl.where(real & (score > 0), key_of(score, feature), -1)
            best = tl.sort(tl.maximum(best, tl.sort(key)), descending=True)
        tl.store(lists_ptr + ((tl.zeros([], tl.int64) + at) * n_splits + split) * BEST + place, best)


@triton.jit(do_not_specialize=["n_splits", "k", "d_sae", "d_in"])
@no_type_check
def _merge_rows_kernel(
    x_ptr, W_ptr, bias_ptr, rows_ptr, n_rows_ptr, lists_ptr, values_ptr, kept_ptr, n_kept_ptr, keys_ptr, n_splits, k,
    d_sae, d_in, MAGNITUDE: tl.constexpr, LANES: tl.constexpr, BEST: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, BEST)
    for at in range(tl.program_id(0), tl.load(n_rows_ptr), LANES):
        row = tl.load(rows_ptr + at).to(tl.int64)
        lists = lists_ptr + (tl.zeros([], tl.int64) + at) * n_splits * BEST
        best = tl.load(lists + place)
        for split in range(1, n_splits):
            best = tl.sort(tl.maximum(best, tl.load(lists + split * BEST + BEST - 1 - place)), descending=True)
        kept = (place < k) & (best >= 0)
        n_kept = tl.sum(kept.to(tl.int32), axis=0)
        feature = tl.sort(tl.where(kept, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), d_sae))
        tl.store(keys_ptr + row * k + place, feature, mask=place < k)
        tl.store(kept_ptr + row * k + place, tl.where(place < n_kept, feature, 0), mask=place < k)
        tl.store(n_kept_ptr + row, n_kept)
        tl.store(values_ptr + row * k + place, tl.zeros([BEST], tl.float32), mask=(place >= n_kept) & (place < k))
        tl.debug_barrier()  # other threads of this program read the ids
        for first in range(0, n_kept, PAIRS):
            slot = first + tl.arange(0, PAIRS)
            real = slot < n_kept
            kept_feature = tl.load(kept_ptr + row * k + slot, mask=real, other=0).to(tl.int64)
            value = tl.zeros([PAIRS], tl.float32)
            for start in range(0, d_in, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                inside = columns < d_in
                x = tl.load(x_ptr + row * d_in + columns, mask=inside, other=0.0)
                at_w = kept_feature[:, None] * d_in + columns[None, :]
                w = tl.load(W_ptr + at_w, mask=real[:, None] & inside[None, :], other=0.0)
                value += tl.sum(x[None, :] * w, axis=1)
            value += tl.load(bias_ptr + kept_feature, mask=real, other=0.0)
            if not MAGNITUDE:
                value = tl.maximum(value, 0.0)  # its sum above had another order
            tl.store(values_ptr + row * k + slot, value, mask=real)


def plan_search(d_sae: int, k: int, n_slices: int) -> Plan:
    """Shares that fit, for all rows at once, in the memory of the scores if these come in `n_slices` slices."""
    n_best = max(16, 1 << (k - 1).bit_length())
    split = max(4 * n_best * n_slices, ceil_div(ceil_div(d_sae, _MOST_SPLITS), n_best) * n_best)
    return Plan(n_best, split, ceil_div(d_sae, split))


def search_rows(
    x: Tensor, W: Tensor, bias: Tensor, uncertain: Uncertain, plan: Plan, lists: Tensor, out: Selection,
    scoring: Scoring = VALUES,
) -> None:  # fmt: skip
    """Select the uncertain rows again, from all features; `lists` is memory for `plan.row_bytes` bytes a row."""
    d_sae, d_in = W.shape
    rows = (*uncertain, lists)
    columns = max(16, _TILE // plan.n_best)
    launch(
        _search_rows_kernel, (plan.n_splits, _LANES), x, W, bias, scoring.norms, *rows, plan.n_splits, d_sae, d_in,
        MAGNITUDE=scoring.magnitude, LANES=_LANES, SPLIT=plan.split, BEST=plan.n_best, COLUMNS=columns, num_warps=_WARPS,
    )  # fmt: skip
    launch(
        _merge_rows_kernel, (_MERGE_LANES,), x, W, bias, *rows, *out, plan.n_splits, out.values.shape[1], d_sae, d_in,
        MAGNITUDE=scoring.magnitude, LANES=_MERGE_LANES, BEST=plan.n_best, PAIRS=_PAIRS, COLUMNS=COLUMNS, num_warps=_WARPS,
    )  # fmt: skip
