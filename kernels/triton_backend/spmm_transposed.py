"""`spmm_transposed` in Triton: `S.T @ g`, where each feature's row is summed in a fixed order, without atomics.

Launch order: d_in is cut into tiles of 256 columns, the slowest grid axis, so that a tile of `g` (8 MB at batch 8192)
stays in the cache while entries gather from it. The much larger result is written once; only rows with extra chunks are
read back.
A feature's first 128 entries are summed into its row. Any further entries (those of a feature that fires on every token,
say) are cut into extra chunks of 128; each has its own program, which writes a partial row, and a second kernel adds them in
order.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs, offsets_of
from saelab.kernels.triton_backend.launch import ceil_div, launch, packed

CHUNK = 128
"""Maximum number of entries that one program sums."""
_PAIRS = 8
_COLUMNS = 256
_BIAS_BLOCK = 128
_WARPS = 2


@triton.jit
@no_type_check
def _gathered_sum(values_ptr, rows_ptr, g_ptr, first, last, columns, d_in, PAIRS: tl.constexpr, COLUMNS: tl.constexpr):
    """`sum over j in [first, last) of values[j] * g[rows[j], columns]`, PAIRS entries at a time."""
    sums = tl.zeros([PAIRS, COLUMNS], tl.float32)
    for start in range(first, last, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        values = tl.load(values_ptr + pairs, mask=pairs < last, other=0.0)
        rows = tl.load(rows_ptr + pairs, mask=pairs < last, other=0).to(tl.int64)
        inside = (pairs < last)[:, None] & (columns < d_in)[None, :]
        sums += values[:, None] * tl.load(g_ptr + rows[:, None] * d_in + columns[None, :], mask=inside, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["n_features"])
@no_type_check
def _spmm_transposed_kernel(
    values_ptr,
    rows_ptr,
    offsets_ptr,
    owners_ptr,
    extra_offsets_ptr,
    g_ptr,
    out_ptr,
    partials_ptr,
    n_features,
    d_in,
    CHUNK: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Programs below `n_features` sum the first chunks into rows; the others sum extra chunks into partial rows."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    extra = program - n_features  # negative for a first chunk
    is_extra = extra >= 0
    feature = tl.where(is_extra, tl.load(owners_ptr + extra, mask=is_extra, other=0), program)
    if feature >= n_features:  # fewer extra chunks than slots
        return
    chunk = tl.where(is_extra, 1 + extra - tl.load(extra_offsets_ptr + feature), 0)
    to_ptr = out_ptr + feature * d_in
    if is_extra:
        to_ptr = partials_ptr + extra * d_in
    first = tl.load(offsets_ptr + feature) + chunk * CHUNK
    last = tl.minimum(first + CHUNK, tl.load(offsets_ptr + feature + 1))
    sums = _gathered_sum(values_ptr, rows_ptr, g_ptr, first, last, columns, d_in, PAIRS, COLUMNS)
    tl.store(to_ptr + columns, sums, mask=columns < d_in)


@triton.jit(do_not_specialize=["n_features"])
@no_type_check
def _add_extra_chunks_kernel(
    owners_ptr, extra_offsets_ptr, partials_ptr, out_ptr, n_features, d_in, COLUMNS: tl.constexpr
):
    """The program of a feature's first extra chunk adds all its extra chunks to the feature's row, in order."""
    extra = tl.program_id(0).to(tl.int64)
    feature = tl.load(owners_ptr + extra)
    if extra != tl.load(extra_offsets_ptr + feature, mask=feature < n_features, other=-1):
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d_in
    sums = tl.load(out_ptr + feature * d_in + columns, mask=inside, other=0.0)
    for chunk in range(extra, tl.load(extra_offsets_ptr + feature + 1)):
        sums += tl.load(partials_ptr + chunk * d_in + columns, mask=inside, other=0.0)
    tl.store(out_ptr + feature * d_in + columns, sums, mask=inside)


@triton.jit
@no_type_check
def _bias_gradient_kernel(values_ptr, offsets_ptr, out_ptr, BLOCK: tl.constexpr):
    feature = tl.program_id(0).to(tl.int64)
    last = tl.load(offsets_ptr + feature + 1)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.load(offsets_ptr + feature), last, BLOCK):
        entries = first + tl.arange(0, BLOCK)
        sums += tl.load(values_ptr + entries, mask=entries < last, other=0.0)
    tl.store(out_ptr + feature, tl.sum(sums, axis=0))


def spmm_transposed(
    feature_acts: SparseActs, values: Float[Tensor, " nnz"], g: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_sae d_in"]:
    """`out[f] = sum over entries j of feature f of values[j] * g[row of j]`, on the pattern of `feature_acts`; fp32."""
    order, rows, offsets = feature_acts.by_feature
    m, d_in = feature_acts.d_sae, g.shape[1]
    owners, extra_offsets = _extra_chunks(offsets, feature_acts.nnz)
    n_extra, n_tiles = owners.numel(), ceil_div(d_in, _COLUMNS)
    out = torch.empty(m, d_in, dtype=torch.float32, device=g.device)
    partials = torch.empty(n_extra, d_in, dtype=torch.float32, device=g.device)
    launch(
        _spmm_transposed_kernel,
        (m + n_extra, n_tiles),
        packed(values[order]),
        packed(rows),
        packed(offsets),
        owners,
        extra_offsets,
        packed(g),
        out,
        partials,
        m,
        d_in,
        CHUNK=CHUNK,
        PAIRS=_PAIRS,
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
    )
    adding = (owners, extra_offsets, partials, out, m, d_in)
    launch(_add_extra_chunks_kernel, (n_extra, n_tiles), *adding, COLUMNS=_COLUMNS, num_warps=_WARPS)
    return out


def _extra_chunks(offsets: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """The feature of each extra chunk, and where each feature's extra chunks begin.

    There are `nnz // CHUNK` slots, the maximum possible number, which avoids waiting for a count from the GPU; an unused
    slot is assigned to the feature id `d_sae`, past the last feature.
    """
    extra_offsets = offsets_of((offsets.diff() - 1).clamp_min(0) // CHUNK)
    chunks = torch.arange(nnz // CHUNK, device=offsets.device)
    return torch.searchsorted(extra_offsets, chunks, right=True) - 1, extra_offsets


def bias_gradient(feature_acts: SparseActs, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
    """`out[f] = sum of the values at feature f`, in fp32, summed in a fixed order."""
    order, _, offsets = feature_acts.by_feature
    out = torch.empty(feature_acts.d_sae, dtype=torch.float32, device=values.device)
    launch(
        _bias_gradient_kernel,
        (feature_acts.d_sae,),
        packed(values[order]),
        packed(offsets),
        out,
        BLOCK=_BIAS_BLOCK,
        num_warps=1,
    )
    return out
