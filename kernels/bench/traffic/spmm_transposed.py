"""`spmm_transposed` in the compile report: its shapes, and the memory traffic of its launch order."""

from __future__ import annotations

from saelab.kernels.bench.traffic.spec import PRODUCTION, KernelSpec, kernel_spec
from saelab.kernels.triton_backend import spmm_transposed as kernel
from saelab.kernels.triton_backend.launch import ceil_div


def production_specs() -> list[KernelSpec]:
    """Entries of the compile report, with the maximum number of extra chunks: one per 128 entries."""
    nnz, block = PRODUCTION.batch * PRODUCTION.k, {"BLOCK": kernel._BIAS_BLOCK}
    types = "*fp32 *i64 *i64 *i64 *i64 *fp32 *fp32 *fp32 i32 i32"
    tile, bias_bytes = {"PAIRS": kernel._PAIRS, "COLUMNS": kernel._COLUMNS}, 4 * nnz + 12 * PRODUCTION.d_sae
    args = (types, {"CHUNK": kernel.CHUNK} | tile, kernel._WARPS, _least_bytes(1 << 62), _hbm_bytes, _least_bytes)
    add = ("*i64 *i64 *fp32 *fp32 i32 i32", {"COLUMNS": kernel._COLUMNS}, kernel._WARPS, _adding_bytes())
    return [
        kernel_spec("spmm_transposed", kernel._spmm_transposed_kernel, *args),
        kernel_spec("add_extra_chunks", kernel._add_extra_chunks_kernel, *add),
        kernel_spec("bias_gradient", kernel._bias_gradient_kernel, "*fp32 *i64 *fp32", block, 1, bias_bytes),
    ]


def _least_bytes(cache: int) -> int:
    """`g` and the result once, and the feature activations once for each of the widest tiles of `g` that fit."""
    batch, d_in, d_sae, k = PRODUCTION
    g_bytes, feature_acts = 4 * batch * d_in, 12 * batch * k + 8 * (d_sae + 1)  # values, rows, offsets
    return g_bytes + 4 * d_sae * d_in + ceil_div(g_bytes, cache) * feature_acts


def _hbm_bytes(cache: int) -> int:
    """The minimum for tiles of 256 columns, plus the extra chunks: their lists, partial rows and sums."""
    batch, d_in, _, k = PRODUCTION
    g_bytes, g_tile, n_extra = 4 * batch * d_in, 4 * batch * kernel._COLUMNS, batch * k // kernel.CHUNK
    refetched = 0 if g_tile <= cache else 4 * batch * k * d_in - g_bytes
    extra = n_extra * (4 * d_in + 16 * ceil_div(d_in, kernel._COLUMNS)) + _adding_bytes()
    return _least_bytes(g_tile) + extra + refetched


def _adding_bytes() -> int:
    """Per tile the lists of extra chunks; their partial rows read; the rows of their features read and written."""
    batch, d_in, _, k = PRODUCTION
    return batch * k // kernel.CHUNK * (16 * ceil_div(d_in, kernel._COLUMNS) + 3 * 4 * d_in)
