"""Gradients of both weight matrices and of the encoder's bias in one pass over the pairs, sorted by feature, without atomics.

    dW_dec[f] = sum z g,   dW_enc[f] = sum dz x,   db_enc[f] = sum dz,   g = 2 residual / variance,   dz = <g, W_dec[f]>

The sorted pairs are cut at multiples of 128. A feature's own program sums its pairs up to the next cut; whatever of it lies
beyond has one program for each stretch between two cuts, whose partial sums a second kernel adds in order. So all programs
are known without counting anything, and none has more than 128 pairs. A program takes one tile of columns of one of the two
matrices, so that no more than a tile of rows has to stay in the cache.

The same pass leaves the parts of `<dW_dec, W_dec>`, `|dW_dec|^2` and `|dW_enc|^2` for the projection and the clip.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.launch import ceil_div, launch

CHUNK = 128
COLUMNS = 256
_PAIRS = 8
_WARPS = 2
_BLOCK = 1024


class Pairs(NamedTuple):
    """The kept pairs sorted by feature."""

    features: Int[Tensor, " pairs"]
    """Ascending; `d_sae` for empty slots."""
    rows: Int[Tensor, " pairs"]
    values: Float[Tensor, " pairs"]
    offsets: Int[Tensor, " d_sae_plus_1"]
    """Where the pairs of each feature begin; the last entry is the number of kept pairs."""


class Gradients(NamedTuple):
    """Gradients of a step, and the parts of each row's products over tiles of columns."""

    W_enc: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_in"]
    """Not yet projected."""
    b_enc: Float[Tensor, " d_sae"]
    parts: Float[Tensor, "3 tiles d_sae"]
    """`<dW_dec, W_dec>`, `|dW_dec|^2`, `|dW_enc|^2`."""


@triton.jit(do_not_specialize=["n_pairs", "k"])
@no_type_check
def _gather_kernel(order_ptr, values_ptr, rows_ptr, out_ptr, n_pairs, k, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = pair < n_pairs
    at = tl.load(order_ptr + pair, mask=real, other=0)
    tl.store(rows_ptr + pair, (at // k).to(tl.int32), mask=real)
    tl.store(out_ptr + pair, tl.load(values_ptr + at, mask=real, other=0.0), mask=real)


@triton.jit
@no_type_check
def _store_row(
    is_enc, feature, tile, n_tiles, columns, sums, W_dec_ptr, dW_enc_ptr, dW_dec_ptr, parts_ptr, d_sae, d_in
):
    """One tile of a feature's row in one of the gradients, and its share of the row's products."""
    inside = columns < d_in
    at = parts_ptr + tile.to(tl.int64) * d_sae + feature
    size = n_tiles.to(tl.int64) * d_sae
    square = tl.sum(sums * sums, axis=0)
    if is_enc:
        tl.store(dW_enc_ptr + feature * d_in + columns, sums, mask=inside)
        tl.store(at + 2 * size, square)
    else:
        tl.store(dW_dec_ptr + feature * d_in + columns, sums, mask=inside)
        w = tl.load(W_dec_ptr + feature * d_in + columns, mask=inside, other=0.0)
        tl.store(at, tl.sum(sums * w, axis=0))
        tl.store(at + size, square)


@triton.jit(do_not_specialize=["d_sae", "d_in", "n_tiles"])
@no_type_check
def _gradients_kernel(
    features_ptr, rows_ptr, values_ptr, offsets_ptr, dvalues_ptr, x_ptr, residual_ptr, variance_ptr, W_dec_ptr,
    dW_enc_ptr, dW_dec_ptr, db_enc_ptr, parts_ptr, far_enc_ptr, far_dec_ptr, far_b_ptr, d_sae, d_in, n_tiles,
    CHUNK: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs below `d_sae` sum a feature's pairs up to the next cut; the others one stretch between two cuts."""
    program = tl.program_id(0).to(tl.int64)
    is_enc = tl.program_id(1) < n_tiles
    tile = tl.where(is_enc, tl.program_id(1), tl.program_id(1) - n_tiles)
    stretch = program - d_sae
    is_far = stretch >= 0
    feature = tl.where(is_far, tl.load(features_ptr + stretch * CHUNK, mask=is_far, other=0).to(tl.int64), program)
    if feature >= d_sae:  # only empty slots
        return
    begin, end = tl.load(offsets_ptr + feature), tl.load(offsets_ptr + feature + 1)
    if is_far & (begin >= stretch * CHUNK):  # its own program sums this
        return
    first = tl.where(is_far, stretch * CHUNK, begin)
    last = tl.minimum(end, (first // CHUNK + 1) * CHUNK)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    factors_ptr, from_ptr, far_ptr = values_ptr, residual_ptr, far_dec_ptr
    if is_enc:
        factors_ptr, from_ptr, far_ptr = dvalues_ptr, x_ptr, far_enc_ptr
    sums, factors = tl.zeros([PAIRS, COLUMNS], tl.float32), tl.zeros([PAIRS], tl.float32)
    for start in range(first, last, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        real = pair < last
        factor = tl.load(factors_ptr + pair, mask=real, other=0.0)
        row = tl.load(rows_ptr + pair, mask=real, other=0).to(tl.int64)
        inside = real[:, None] & (columns < d_in)[None, :]
        sums += factor[:, None] * tl.load(from_ptr + row[:, None] * d_in + columns[None, :], mask=inside, other=0.0)
        factors += factor
    scale = 2.0 / tl.maximum(tl.load(variance_ptr), 1.1754943508222875e-38)
    total, b = tl.sum(sums, axis=0) * scale, tl.sum(factors, axis=0) * scale
    bias_here = is_enc & (tile == 0)
    if is_far:
        tl.store(far_ptr + stretch * d_in + columns, total, mask=columns < d_in)
        tl.store(far_b_ptr + stretch, b, mask=bias_here)
    else:
        _store_row(
            is_enc, feature, tile, n_tiles, columns, total, W_dec_ptr, dW_enc_ptr, dW_dec_ptr, parts_ptr, d_sae, d_in
        )  # fmt: skip
        tl.store(db_enc_ptr + feature, b, mask=bias_here)


@triton.jit(do_not_specialize=["d_sae", "d_in", "n_tiles"])
@no_type_check
def _add_far_kernel(
    features_ptr, offsets_ptr, W_dec_ptr, dW_enc_ptr, dW_dec_ptr, db_enc_ptr, parts_ptr, far_enc_ptr, far_dec_ptr, far_b_ptr,
    d_sae, d_in, n_tiles, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The program of the first stretch of a feature beyond a cut adds all of them to the feature's row, in order."""
    stretch = tl.program_id(0).to(tl.int64)
    is_enc = tl.program_id(1) < n_tiles
    tile = tl.where(is_enc, tl.program_id(1), tl.program_id(1) - n_tiles)
    feature = tl.load(features_ptr + stretch * CHUNK).to(tl.int64)
    if feature >= d_sae:
        return
    begin, end = tl.load(offsets_ptr + feature), tl.load(offsets_ptr + feature + 1)
    if (begin >= stretch * CHUNK) | (begin < (stretch - 1) * CHUNK):
        return
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d_in
    own_ptr, far_ptr = dW_dec_ptr, far_dec_ptr
    if is_enc:
        own_ptr, far_ptr = dW_enc_ptr, far_enc_ptr
    sums, b = tl.load(own_ptr + feature * d_in + columns, mask=inside, other=0.0), tl.load(db_enc_ptr + feature)
    for far in range(stretch, (end + CHUNK - 1) // CHUNK):
        sums += tl.load(far_ptr + far * d_in + columns, mask=inside, other=0.0)
        b += tl.load(far_b_ptr + far)
    _store_row(is_enc, feature, tile, n_tiles, columns, sums, W_dec_ptr, dW_enc_ptr, dW_dec_ptr, parts_ptr, d_sae, d_in)
    tl.store(db_enc_ptr + feature, b, mask=is_enc & (tile == 0))


@triton.jit(do_not_specialize=["d_sae", "d_in", "n_tiles"])
@no_type_check
def _add_rows_kernel(
    ids_ptr, enc_ptr, dec_ptr, b_ptr, W_dec_ptr, dW_enc_ptr, dW_dec_ptr, db_enc_ptr, parts_ptr, d_sae, d_in, n_tiles,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    is_enc = tl.program_id(1) < n_tiles
    tile = tl.where(is_enc, tl.program_id(1), tl.program_id(1) - n_tiles)
    feature = tl.load(ids_ptr + at)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    own_ptr, more_ptr = dW_dec_ptr, dec_ptr
    if is_enc:
        own_ptr, more_ptr = dW_enc_ptr, enc_ptr
    sums = tl.load(own_ptr + feature * d_in + columns, mask=columns < d_in, other=0.0)
    sums += tl.load(more_ptr + at * d_in + columns, mask=columns < d_in, other=0.0)
    _store_row(is_enc, feature, tile, n_tiles, columns, sums, W_dec_ptr, dW_enc_ptr, dW_dec_ptr, parts_ptr, d_sae, d_in)
    bias_here = is_enc & (tile == 0)
    b = tl.load(db_enc_ptr + feature, mask=bias_here, other=0.0) + tl.load(b_ptr + at, mask=bias_here, other=0.0)
    tl.store(db_enc_ptr + feature, b, mask=bias_here)


def sort_pairs(
    keys: Int[Tensor, "batch k"], values: Float[Tensor, "batch k"], bins: Int[Tensor, " d_sae_plus_1"]
) -> Pairs:
    """The pairs by feature, and by row within a feature; `bins` are the numbers from 0 to d_sae."""
    features, order = keys.view(-1).sort(stable=True)
    rows, sorted_values = torch.empty_like(features), torch.empty_like(values.view(-1))
    operands = (order, values, rows, sorted_values, order.numel(), values.shape[1])
    launch(_gather_kernel, (ceil_div(order.numel(), _BLOCK),), *operands, BLOCK=_BLOCK, num_warps=_WARPS)
    return Pairs(features, rows, sorted_values, torch.searchsorted(features, bins))


def weight_gradients(
    pairs: Pairs, dvalues: Tensor, x: Tensor, residual: Tensor, variance: Tensor, W_dec: Tensor, out: Gradients
) -> None:
    """Fill `out`; `dvalues` is `<residual[row], W_dec[feature]>` of the pairs, sorted as they are."""
    d_sae, d_in = W_dec.shape
    n_far, n_tiles = ceil_div(pairs.rows.numel(), CHUNK), ceil_div(d_in, COLUMNS)
    far = [torch.empty(n_far, *width, dtype=torch.float32, device=x.device) for width in ((d_in,), (d_in,), ())]
    operands = (*pairs, dvalues, x, residual, variance, W_dec, *out, *far, d_sae, d_in, n_tiles)
    sizes = {"CHUNK": CHUNK, "COLUMNS": COLUMNS}
    grid = (d_sae + n_far, 2 * n_tiles)
    launch(_gradients_kernel, grid, *operands, PAIRS=_PAIRS, **sizes, num_warps=_WARPS)
    operands = (pairs.features, pairs.offsets, W_dec, *out, *far, d_sae, d_in, n_tiles)
    launch(_add_far_kernel, (n_far, 2 * n_tiles), *operands, **sizes, num_warps=_WARPS)


def add_rows(ids: Int[Tensor, " n"], enc: Tensor, b_enc: Tensor, dec: Tensor, W_dec: Tensor, out: Gradients) -> None:
    """Add gradients of the features `ids`, each of them named once, to `out`."""
    (d_sae, d_in), n_tiles = W_dec.shape, out.parts.shape[1]
    operands = (ids, enc.contiguous(), dec.contiguous(), b_enc.contiguous(), W_dec, *out, d_sae, d_in, n_tiles)
    launch(_add_rows_kernel, (ids.numel(), 2 * n_tiles), *operands, COLUMNS=COLUMNS, num_warps=_WARPS)


def empty_gradients(W_dec: Tensor) -> Gradients:
    """Room for the gradients of a step."""
    d_sae, d_in = W_dec.shape
    parts = torch.empty(3, ceil_div(d_in, COLUMNS), d_sae, dtype=torch.float32, device=W_dec.device)
    return Gradients(torch.empty_like(W_dec), torch.empty_like(W_dec), torch.empty(d_sae, device=W_dec.device), parts)
