"""Inner products at chosen pairs, as partial sums over tiles of 256 columns: exact values of candidates, and their gradients.

A tile of all weights is gathered from row by row if it stays in the cache. Otherwise the pairs are taken by feature, so that
the weights stream through once and a tile of the rows stays. The arithmetic of a pair is independent of the others.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.launch import ceil_div, launch
from saelab.kernels.triton_backend.sddmm import CACHE_BYTES

COLUMNS = 256
ROW_PAIRS, ROW_WARPS = 8, 2
_PAIRS, _WARPS = 16, 4


@triton.jit(do_not_specialize=["n_pairs", "d_in"])
@no_type_check
def _by_row_kernel(
    x_ptr, W_ptr, features_ptr, counts_ptr, chosen_ptr, partials_ptr, n_pairs, d_in,
    SLOTS: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d_in
    x = tl.load(x_ptr + row * d_in + columns, mask=inside, other=0.0)
    count = tl.minimum(tl.load(counts_ptr + row), SLOTS)
    for first in range(0, count, PAIRS):
        slot = first + tl.arange(0, PAIRS)
        real = slot < count
        if chosen_ptr is not None:
            slot = tl.load(chosen_ptr + row * SLOTS + slot, mask=real, other=0)
        feature = tl.load(features_ptr + row * SLOTS + slot, mask=real, other=0).to(tl.int64)
        at_w = feature[:, None] * d_in + columns[None, :]
        w = tl.load(W_ptr + at_w, mask=real[:, None] & inside[None, :], other=0.0)
        partial = tl.sum(x[None, :] * w, axis=1)
        tl.store(partials_ptr + tile.to(tl.int64) * n_pairs + row * SLOTS + slot, partial, mask=real)


@triton.jit(do_not_specialize=["n_pairs", "d_sae", "d_in"])
@no_type_check
def _by_feature_kernel(
    x_ptr, W_ptr, features_ptr, order_ptr, rows_ptr, partials_ptr, n_pairs, d_sae, d_in,
    SLOTS: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The pairs are sorted by feature; `order` are their places `row * SLOTS + slot`, to which the sums are written. With
    `rows` the rows are theirs at these places; without `order` the places are those of the pairs."""
    first = tl.program_id(0).to(tl.int64) * PAIRS
    if tl.load(features_ptr + first) >= d_sae:  # only empty slots
        return
    tile = tl.program_id(1)
    pair = first + tl.arange(0, PAIRS)
    feature = tl.load(features_ptr + pair, mask=pair < n_pairs, other=2147483647).to(tl.int64)
    real = feature < d_sae
    place = pair
    if order_ptr is not None:
        place = tl.load(order_ptr + pair, mask=pair < n_pairs, other=0).to(tl.int64)
    row = place // SLOTS
    if rows_ptr is not None:
        row = tl.load(rows_ptr + place, mask=real, other=0).to(tl.int64)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = real[:, None] & (columns < d_in)[None, :]
    x = tl.load(x_ptr + row[:, None] * d_in + columns[None, :], mask=inside, other=0.0)
    w = tl.load(W_ptr + feature[:, None] * d_in + columns[None, :], mask=inside, other=0.0)
    tl.store(partials_ptr + tile.to(tl.int64) * n_pairs + place, tl.sum(x * w, axis=1), mask=real)


def pair_products(
    x: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], features: Int[Tensor, "batch slots"],
    counts: Int[Tensor, " batch"], chosen: Int[Tensor, "batch slots"] | None = None,
    by_feature: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "tiles pairs"]:  # fmt: skip
    """Partial sums of `<x[row], W[feature]>` at the first `counts` slots of each row; undefined in the others.

    With `chosen` at the slots that its first `counts` entries name instead. `by_feature` are the features of all slots
    (`d_sae` where empty), sorted, and their places, if somebody has sorted them already.
    """
    (n_rows, n_slots), (d_sae, d_in) = features.shape, W.shape
    n_pairs, n_tiles = n_rows * n_slots, ceil_div(d_in, COLUMNS)
    partials = torch.empty(n_tiles, n_pairs, dtype=torch.float32, device=x.device)
    tile = {"SLOTS": n_slots, "COLUMNS": COLUMNS}
    if chosen is not None or d_sae * COLUMNS * W.element_size() <= CACHE_BYTES:
        operands = (x, W, features, counts, chosen, partials, n_pairs, d_in)
        launch(_by_row_kernel, (n_rows, n_tiles), *operands, PAIRS=ROW_PAIRS, **tile, num_warps=ROW_WARPS)
        return partials
    operands = (x, W, *(by_feature or features.view(-1).sort()), None, partials, n_pairs, d_sae, d_in)
    launch(_by_feature_kernel, (ceil_div(n_pairs, _PAIRS), n_tiles), *operands, PAIRS=_PAIRS, **tile, num_warps=_WARPS)
    return partials


def list_products(
    x: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], features: Int[Tensor, " pairs"],
    rows: Int[Tensor, " pairs"], by_feature: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "tiles pairs"]:  # fmt: skip
    """Partial sums of `<x[row], W[feature]>` at the pairs of a list, behind which the features are `d_sae`: undefined there."""
    (d_sae, d_in), n_pairs, n_tiles = W.shape, len(features), ceil_div(W.shape[1], COLUMNS)
    partials = torch.empty(n_tiles, n_pairs, dtype=torch.float32, device=x.device)
    stays = d_sae * COLUMNS * W.element_size() <= CACHE_BYTES
    taken = (features, None) if stays else by_feature or features.sort()
    operands = (x, W, *taken, rows, partials, n_pairs, d_sae, d_in)
    tile = {"SLOTS": 1, "PAIRS": _PAIRS, "COLUMNS": COLUMNS}
    launch(_by_feature_kernel, (ceil_div(n_pairs, _PAIRS), n_tiles), *operands, **tile, num_warps=_WARPS)
    return partials
