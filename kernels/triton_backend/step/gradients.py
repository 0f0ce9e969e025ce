"""Gradients of both weight matrices and of the encoder's bias in one pass over the pairs, sorted by feature, without atomics.

    dW_dec[f] = sum z g,   dW_enc[f] = sum dz x,   db_enc[f] = sum dz,   g = 2 residual / variance,   dz = <g, W_dec[f]>

The sorted pairs are cut at multiples of 128. A feature's own program sums its pairs up to the next cut; whatever of it lies
beyond has one program for each stretch between two cuts, whose partial sums a second kernel adds in order. So all programs
are known without counting anything, and none has more than 128 pairs. A program takes one tile of columns of one of the two
matrices, so that no more than a tile of rows has to stay in the cache.
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
    order: Int[Tensor, " pairs"]
    """Place `row * k + slot` of each."""
    offsets: Int[Tensor, " d_sae_plus_1"]
    """Where the pairs of each feature begin; the last entry is the number of kept pairs."""


class Gradients(NamedTuple):
    """Gradients of a step."""

    W_enc: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_in"]
    """Not yet projected."""
    b_enc: Float[Tensor, " d_sae"]


@triton.jit(do_not_specialize=["n_pairs", "k"])
@no_type_check
def _gather_kernel(
    order_ptr, values_ptr, dvalues_ptr, listed_ptr, rows_ptr, z_ptr, dz_ptr, n_pairs, k, BLOCK: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = pair < n_pairs
    at = tl.load(order_ptr + pair, mask=real, other=0)
    row = (at // k).to(tl.int32)
    if listed_ptr is not None:
        row = tl.load(listed_ptr + at, mask=real, other=0)
    tl.store(rows_ptr + pair, row, mask=real)
    tl.store(z_ptr + pair, tl.load(values_ptr + at, mask=real, other=0.0), mask=real)
    tl.store(dz_ptr + pair, tl.load(dvalues_ptr + at, mask=real, other=0.0), mask=real)


@triton.jit(do_not_specialize=["d_sae", "d_in", "n_tiles"])
@no_type_check
def _gradients_kernel(
    features_ptr, offsets_ptr, rows_ptr, z_ptr, dz_ptr, x_ptr, residual_ptr, variance_ptr, dW_enc_ptr, dW_dec_ptr, db_enc_ptr,
    far_enc_ptr, far_dec_ptr, far_b_ptr, d_sae, d_in, n_tiles,
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
    factors_ptr, from_ptr, to_ptr = z_ptr, residual_ptr, dW_dec_ptr
    if is_enc:
        factors_ptr, from_ptr, to_ptr = dz_ptr, x_ptr, dW_enc_ptr
    to_b_ptr, at = db_enc_ptr, feature
    if is_far:
        to_ptr, to_b_ptr, at = far_dec_ptr, far_b_ptr, stretch
        if is_enc:
            to_ptr = far_enc_ptr
    sums, factors = tl.zeros([PAIRS, COLUMNS], tl.float32), tl.zeros([PAIRS], tl.float32)
    for start in range(first, last, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        factor = tl.load(factors_ptr + pair, mask=pair < last, other=0.0)
        row = tl.load(rows_ptr + pair, mask=pair < last, other=0).to(tl.int64)
        inside = (pair < last)[:, None] & (columns < d_in)[None, :]
        sums += factor[:, None] * tl.load(from_ptr + row[:, None] * d_in + columns[None, :], mask=inside, other=0.0)
        factors += factor
    scale = 2.0 / tl.maximum(tl.load(variance_ptr), 1.1754943508222875e-38)
    tl.store(to_ptr + at * d_in + columns, tl.sum(sums, axis=0) * scale, mask=columns < d_in)
    tl.store(to_b_ptr + at, tl.sum(factors, axis=0) * scale, mask=is_enc & (tile == 0))


@triton.jit(do_not_specialize=["d_sae", "d_in", "n_tiles"])
@no_type_check
def _add_far_kernel(
    features_ptr, offsets_ptr, dW_enc_ptr, dW_dec_ptr, db_enc_ptr, far_enc_ptr, far_dec_ptr, far_b_ptr, d_sae, d_in, n_tiles,
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
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
    to_ptr, far_ptr = dW_dec_ptr, far_dec_ptr
    if is_enc:
        to_ptr, far_ptr = dW_enc_ptr, far_enc_ptr
    sums, b = tl.load(to_ptr + feature * d_in + columns, mask=inside, other=0.0), tl.load(db_enc_ptr + feature)
    for far in range(stretch, (end + CHUNK - 1) // CHUNK):
        sums += tl.load(far_ptr + far * d_in + columns, mask=inside, other=0.0)
        b += tl.load(far_b_ptr + far)
    tl.store(to_ptr + feature * d_in + columns, sums, mask=inside)
    tl.store(db_enc_ptr + feature, b, mask=is_enc & (tile == 0))


def sort_pairs(keys: Int[Tensor, "batch k"] | Int[Tensor, " pairs"], bins: Int[Tensor, " d_sae_plus_1"]) -> Pairs:
    """The pairs by feature, and by row within a feature; `bins` are the numbers from 0 to d_sae."""
    features, order = keys.view(-1).sort(stable=True)
    return Pairs(features, order, torch.searchsorted(features, bins))


def fill_gradients(
    pairs: Pairs, values: Float[Tensor, "batch k"] | Float[Tensor, " pairs"], dvalues: Float[Tensor, " pairs"], x: Tensor,
    residual: Tensor, variance: Tensor, out: Gradients, listed: Int[Tensor, " pairs"] | None = None,
) -> None:  # fmt: skip
    """Fill `out`; `dvalues` is `<residual[row], W_dec[feature]>`, in the order of the rows as `values` are. For pairs of a list
    `listed` are their rows."""
    (d_sae, d_in), n_pairs = out.W_enc.shape, pairs.order.numel()
    n_far, n_tiles = ceil_div(n_pairs, CHUNK), ceil_div(d_in, COLUMNS)
    rows, sorted_values = torch.empty_like(pairs.features), torch.empty(2, n_pairs, device=x.device)
    gathered = (pairs.order, values, dvalues, listed, rows, *sorted_values, n_pairs, values.shape[-1])
    launch(_gather_kernel, (ceil_div(n_pairs, _BLOCK),), *gathered, BLOCK=_BLOCK, num_warps=_WARPS)
    far = [torch.empty(n_far, *width, dtype=torch.float32, device=x.device) for width in ((d_in,), (d_in,), ())]
    sizes, shape = {"CHUNK": CHUNK, "COLUMNS": COLUMNS}, (d_sae, d_in, n_tiles)
    operands = (pairs.features, pairs.offsets, rows, *sorted_values, x, residual, variance, *out, *far, *shape)
    launch(_gradients_kernel, (d_sae + n_far, 2 * n_tiles), *operands, PAIRS=_PAIRS, **sizes, num_warps=_WARPS)
    operands = (pairs.features, pairs.offsets, *out, *far, *shape)
    launch(_add_far_kernel, (n_far, 2 * n_tiles), *operands, **sizes, num_warps=_WARPS)


def empty_gradients(W_dec: Tensor) -> Gradients:
    """Room for the gradients of a step."""
    return Gradients(torch.empty_like(W_dec), torch.empty_like(W_dec), torch.empty(len(W_dec), device=W_dec.device))
