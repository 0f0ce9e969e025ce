"""Gradients of both weight matrices and of the encoder's bias in one pass over the pairs, sorted by feature, without atomics.

    dW_dec[f] = sum z g,   dW_enc[f] = sum dz x,   db_enc[f] = sum dz,   with g = factor * residual, dz = factor * <residual, W_dec[f]>

The sorted pairs are cut at multiples of 128. A feature's own program sums its pairs up to the next cut; whatever of it lies
beyond has one program for each stretch between two cuts, whose partial sums a second kernel adds in order. So all programs
are known without counting anything, and none has more than 128 pairs.

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
_WARPS = 4


class Pairs(NamedTuple):
    """The kept pairs sorted by feature."""

    features: Int[Tensor, " pairs"]
    """Ascending; `d_sae` for empty slots."""
    order: Int[Tensor, " pairs"]
    """Position `row * k + slot` of each."""
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


@triton.jit
@no_type_check
def _store_row(feature, tile, columns, enc, dec, W_dec_ptr, dW_enc_ptr, dW_dec_ptr, parts_ptr, d_sae, d_in):
    """One tile of a feature's two gradients, and its share of their products."""
    inside = columns < d_in
    tl.store(dW_enc_ptr + feature * d_in + columns, enc, mask=inside)
    tl.store(dW_dec_ptr + feature * d_in + columns, dec, mask=inside)
    w = tl.load(W_dec_ptr + feature * d_in + columns, mask=inside, other=0.0)
    n_tiles = tl.num_programs(1)
    at = parts_ptr + tile.to(tl.int64) * d_sae + feature
    tl.store(at, tl.sum(dec * w, axis=0))
    tl.store(at + n_tiles.to(tl.int64) * d_sae, tl.sum(dec * dec, axis=0))
    tl.store(at + 2 * n_tiles.to(tl.int64) * d_sae, tl.sum(enc * enc, axis=0))


@triton.jit(do_not_specialize=["k", "d_sae", "d_in"])
@no_type_check
def _gradients_kernel(
    features_ptr, order_ptr, offsets_ptr, values_ptr, dvalues_ptr, x_ptr, residual_ptr, variance_ptr, W_dec_ptr,
    dW_enc_ptr, dW_dec_ptr, db_enc_ptr, parts_ptr, far_enc_ptr, far_dec_ptr, far_b_ptr, k, d_sae, d_in,
    CHUNK: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs below `d_sae` sum a feature's pairs up to the next cut; the others one stretch between two cuts."""
    program = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
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
    enc, dec = tl.zeros([PAIRS, COLUMNS], tl.float32), tl.zeros([PAIRS, COLUMNS], tl.float32)
    bias = tl.zeros([PAIRS], tl.float32)
    for start in range(first, last, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        real = pair < last
        at = tl.load(order_ptr + pair, mask=real, other=0)
        z = tl.load(values_ptr + at, mask=real, other=0.0)
        dz = tl.load(dvalues_ptr + at, mask=real, other=0.0)
        row = (at // k)[:, None] * d_in + columns[None, :]
        inside = real[:, None] & (columns < d_in)[None, :]
        enc += dz[:, None] * tl.load(x_ptr + row, mask=inside, other=0.0)
        dec += z[:, None] * tl.load(residual_ptr + row, mask=inside, other=0.0)
        bias += dz
    factor = 2.0 / tl.maximum(tl.load(variance_ptr), 1.1754943508222875e-38)
    enc_row, dec_row, b = tl.sum(enc, axis=0) * factor, tl.sum(dec, axis=0) * factor, tl.sum(bias, axis=0) * factor
    if is_far:
        tl.store(far_enc_ptr + stretch * d_in + columns, enc_row, mask=columns < d_in)
        tl.store(far_dec_ptr + stretch * d_in + columns, dec_row, mask=columns < d_in)
        tl.store(far_b_ptr + stretch, b, mask=tile == 0)
    else:
        _store_row(
            feature, tile, columns, enc_row, dec_row, W_dec_ptr, dW_enc_ptr, dW_dec_ptr, parts_ptr, d_sae, d_in
        )
        tl.store(db_enc_ptr + feature, b, mask=tile == 0)


@triton.jit(do_not_specialize=["d_sae", "d_in"])
@no_type_check
def _add_far_kernel(
    features_ptr, offsets_ptr, W_dec_ptr, dW_enc_ptr, dW_dec_ptr, db_enc_ptr, parts_ptr, far_enc_ptr, far_dec_ptr, far_b_ptr,
    d_sae, d_in, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The program of the first stretch of a feature beyond a cut adds all of them to the feature's row, in order."""
    stretch = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    feature = tl.load(features_ptr + stretch * CHUNK).to(tl.int64)
    if feature >= d_sae:
        return
    begin, end = tl.load(offsets_ptr + feature), tl.load(offsets_ptr + feature + 1)
    if (begin >= stretch * CHUNK) | (begin < (stretch - 1) * CHUNK):
        return
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d_in
    enc = tl.load(dW_enc_ptr + feature * d_in + columns, mask=inside, other=0.0)
    dec = tl.load(dW_dec_ptr + feature * d_in + columns, mask=inside, other=0.0)
    b = tl.load(db_enc_ptr + feature)
    for far in range(stretch, (end + CHUNK - 1) // CHUNK):
        enc += tl.load(far_enc_ptr + far * d_in + columns, mask=inside, other=0.0)
        dec += tl.load(far_dec_ptr + far * d_in + columns, mask=inside, other=0.0)
        b += tl.load(far_b_ptr + far)
    _store_row(feature, tile, columns, enc, dec, W_dec_ptr, dW_enc_ptr, dW_dec_ptr, parts_ptr, d_sae, d_in)
    tl.store(db_enc_ptr + feature, b, mask=tile == 0)


def sort_pairs(keys: Int[Tensor, "batch k"], bins: Int[Tensor, " d_sae_plus_1"]) -> Pairs:
    """The pairs by feature, and by row within a feature; `bins` are the numbers from 0 to d_sae."""
    features, order = keys.view(-1).sort(stable=True)
    return Pairs(features, order, torch.searchsorted(features, bins))


def weight_gradients(
    pairs: Pairs, values: Tensor, dvalues: Tensor, x: Tensor, residual: Tensor, variance: Tensor, W_dec: Tensor,
    out: Gradients,
) -> None:  # fmt: skip
    """Fill `out`; `values` and `dvalues` are `(batch, k)` in the order of the rows."""
    d_sae, d_in = W_dec.shape
    n_far, n_tiles = ceil_div(pairs.order.numel(), CHUNK), ceil_div(d_in, COLUMNS)
    far = [torch.empty(n_far, *width, dtype=torch.float32, device=x.device) for width in ((d_in,), (d_in,), ())]
    operands = (*pairs, values, dvalues, x, residual, variance, W_dec, *out, *far)
    sizes = {"CHUNK": CHUNK, "COLUMNS": COLUMNS}
    launch(
        _gradients_kernel, (d_sae + n_far, n_tiles), *operands, values.shape[1], d_sae, d_in,
        PAIRS=_PAIRS, **sizes, num_warps=_WARPS,
    )  # fmt: skip
    operands = (pairs.features, pairs.offsets, W_dec, *out, *far, d_sae, d_in)
    launch(_add_far_kernel, (n_far, n_tiles), *operands, **sizes, num_warps=_WARPS)


def empty_gradients(W_dec: Tensor) -> Gradients:
    """Room for the gradients of a step."""
    d_sae, d_in = W_dec.shape
    parts = torch.empty(3, ceil_div(d_in, COLUMNS), d_sae, dtype=torch.float32, device=W_dec.device)
    return Gradients(
        torch.empty_like(W_dec), torch.empty_like(W_dec), torch.empty(d_sae, device=W_dec.device), parts
    )
