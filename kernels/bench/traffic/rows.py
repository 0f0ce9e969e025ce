"""`rows` in the compile report: its shapes, and the memory traffic of its launch order."""

from __future__ import annotations

from saelab.kernels.bench.traffic.spec import PRODUCTION, KernelSpec, kernel_spec
from saelab.kernels.triton_backend import rows as kernel


def production_specs() -> list[KernelSpec]:
    """Entries of the compile report. All traffic is compulsory, for any cache size."""
    weights, norms = 4 * PRODUCTION.d_sae * PRODUCTION.d_in, 4 * PRODUCTION.d_sae
    round_types = "*fp32 *bf16 *fp32 *fp32 i32 i32"
    block = {"BLOCK": kernel._BLOCK}
    return [
        kernel_spec(
            "round_rows",
            kernel._round_rows_kernel,
            round_types,
            block,
            kernel._WARPS,
            weights + weights // 2 + 2 * norms,
        ),
        kernel_spec("project_", kernel._project_kernel, "*fp32 *fp32 i32", block, kernel._WARPS, 3 * weights),
        kernel_spec("unit_norm_", kernel._unit_norm_kernel, "*fp32 i32 fp32", block, kernel._WARPS, 2 * weights),
    ]
