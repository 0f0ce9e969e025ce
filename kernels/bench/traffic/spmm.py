"""`spmm` in the compile report: its shapes, and the memory traffic of its launch order."""

from __future__ import annotations

from saelab.kernels.bench.traffic.spec import PRODUCTION, SMALL, KernelSpec, Shape, kernel_spec
from saelab.kernels.triton_backend import spmm as kernel
from saelab.kernels.triton_backend.launch import ceil_div


def production_specs() -> list[KernelSpec]:
    """Entries of the compile report: the decoder with bias, target and loss, for a large and a small dictionary."""
    return [_spec("spmm", PRODUCTION), _spec("spmm small", SMALL)]


def _spec(name: str, shape: Shape) -> KernelSpec:
    batch, d_in, d_sae, k = shape
    nnz, columns = batch * k, kernel._columns(d_sae, d_in, 4)
    n_tiles = ceil_div(d_in, columns)
    feature_acts, dense = 12 * nnz + 8 * (batch + 1), 4 * d_in * (d_sae + 1 + 2 * batch)  # W, bias, target and out
    squares = 8 * n_tiles * batch + 4 * batch  # written and read per tile, then the sums

    def hbm_bytes(cache: int) -> int:
        """Between two uses of an id, one whole tile is touched; between two uses of a row of a tile of `W`, at most that."""
        between_uses = dense // n_tiles + feature_acts
        refetched = 0 if between_uses <= cache else (n_tiles - 1) * feature_acts
        if 4 * d_sae * columns > cache:
            refetched += 4 * max(0, nnz - d_sae) * d_in
        return dense + squares + feature_acts + refetched

    return kernel_spec(
        name,
        kernel._spmm_fwd_kernel,
        "*fp32 *i64 *i64 *fp32 *fp32 *fp32 *fp32 *fp32 i32 i32",
        {"PAIRS": kernel._TILE // columns, "COLUMNS": columns},
        kernel._WARPS,
        dense + feature_acts + 4 * batch,  # also the minimum if the cache holds the activations and a narrow tile
        hbm_bytes,
    )
