"""`sddmm` in the compile report: its shapes, and the memory traffic of its launch order."""

from __future__ import annotations

from saelab.kernels.bench.traffic.spec import PRODUCTION, KernelSpec, kernel_spec
from saelab.kernels.triton_backend import sddmm as kernel
from saelab.kernels.triton_backend.launch import ceil_div


def production_specs() -> list[KernelSpec]:
    """Entries of the compile report. The bytes of `sddmm` include reading its partial sums again in `kernel.sum_slices`.

    PyTorch's sort of the pairs is not included: 12 bytes per pair and pass, 2 % of the product's bytes.
    """
    batch, d_in, d_sae, k = PRODUCTION
    nnz, n_tiles = batch * k, ceil_div(d_in, kernel._COLUMNS)
    x_bytes, W_bytes = 4 * batch * d_in, 4 * d_sae * d_in

    def in_tiles(n: int) -> int:
        """`x` and `W` once; per tile, row and feature ids and a partial sum written and read; positions and values."""
        return x_bytes + W_bytes + n * 8 * nnz + (n * 8 * nnz if n > 1 else 0) + 12 * nnz

    def hbm_bytes(cache: int) -> int:
        refetched = 0 if x_bytes // n_tiles <= cache else 4 * nnz * d_in - x_bytes
        return in_tiles(n_tiles) + refetched

    def least_bytes(cache: int) -> int:
        """With the widest tiles of `x` that fit the cache."""
        return in_tiles(ceil_div(x_bytes, cache))

    types, tile = "*fp32 *fp32 *i32 *i32 *fp32 i32 i32", {"PAIRS": kernel._PAIRS, "COLUMNS": kernel._COLUMNS}
    args = (types, tile, kernel._WARPS, in_tiles(1), hbm_bytes, least_bytes)
    slices = ("*fp32 *i64 *fp32 i32 i32", {"BLOCK": kernel._SUM_BLOCK}, kernel._WARPS, (4 * n_tiles + 12) * nnz)
    return [
        kernel_spec("sddmm", kernel._sddmm_fwd_kernel, *args),
        kernel_spec("sum_slices", kernel._sum_slices_kernel, *slices),
    ]
