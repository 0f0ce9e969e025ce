"""`sddmm` in the compile report: its shapes, and the bytes that its launch order moves."""

from __future__ import annotations

from saelab.kernels.bench.traffic.spec import PRODUCTION, KernelSpec, kernel_spec
from saelab.kernels.triton_backend import sddmm as kernel
from saelab.kernels.triton_backend.launch import ceil_div


def production_specs() -> list[KernelSpec]:
    """The compile report's entries. The product's bytes hold its partial sums' way back through `kernel.sum_slices` too.

    The sort of the pairs, PyTorch's, is not in them: 12 bytes a pair and pass, 2 % of the product's.
    """
    batch, d_in, d_sae, k = PRODUCTION
    nnz, n_tiles = batch * k, ceil_div(d_in, kernel._COLUMNS)
    x_bytes, W_bytes = 4 * batch * d_in, 4 * d_sae * d_in

    def in_tiles(n: int) -> int:
        """`x` once, `W` once; rows and features a tile; a partial sum written and read a tile; places and values."""
        return x_bytes + W_bytes + n * 8 * nnz + (n * 8 * nnz if n > 1 else 0) + 12 * nnz

    def hbm_bytes(cache: int) -> int:
        refetched = 0 if x_bytes // n_tiles <= cache else 4 * nnz * d_in - x_bytes
        return in_tiles(n_tiles) + refetched

    def least_bytes(cache: int) -> int:
        """The widest tiles of `x` that fit."""
        return in_tiles(ceil_div(x_bytes, cache))

    types, tile = "*fp32 *fp32 *i32 *i32 *fp32 i32 i32", {"PAIRS": kernel._PAIRS, "COLUMNS": kernel._COLUMNS}
    args = (types, tile, kernel._WARPS, in_tiles(1), hbm_bytes, least_bytes)
    slices = ("*fp32 *i64 *fp32 i32 i32", {"BLOCK": kernel._SUM_BLOCK}, kernel._WARPS, (4 * n_tiles + 12) * nnz)
    return [
        kernel_spec("sddmm", kernel._sddmm_fwd_kernel, *args),
        kernel_spec("sum_slices", kernel._sum_slices_kernel, *slices),
    ]
