"""`group_max` in the compile report: its shapes, and the memory traffic of its launch order."""

from __future__ import annotations

from saelab.kernels.bench.traffic.hbm_model import Product
from saelab.kernels.bench.traffic.spec import ITEMSIZE, KernelSpec, ScreenShape, screen_cases
from saelab.kernels.triton_backend import group_max as kernel
from saelab.kernels.triton_backend.launch import resident_parts


def production_specs() -> list[KernelSpec]:
    """This kernel at the shapes of the compile report, with the tile of each target."""
    return [_spec(*case) for case in screen_cases()]


def _spec(shape: ScreenShape, target: str, dtype: str) -> KernelSpec:
    itemsize = ITEMSIZE[dtype]
    tile, row_bytes = kernel.tile_of(target, itemsize), shape.K * itemsize
    arguments = kernel.constexprs(shape.K, shape.d_sae, shape.n_groups, False, tile, itemsize) | {"WIDEN": False}
    traffic = Product(shape.rows * row_bytes, shape.d_sae * row_bytes, once_bytes=shape.rows * shape.n_groups * 4)
    return KernelSpec(
        name=f"group_max[{shape.label}-{dtype}]",
        fn=kernel._group_max_fwd_kernel,
        signature={"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "maxima_ptr": "*fp32", "rows": "i32"},
        constexprs=arguments,
        **tile.options,
        hbm_bytes=lambda cache: traffic.a_resident(len(resident_parts(shape.rows, row_bytes, cache))),
        least_bytes=traffic.minimum,
        compulsory_bytes=traffic.compulsory,
        tile=(tile.rows, arguments["BLOCK_G"] * arguments["BLOCK_MEMBERS"]),
        tensor_cores=dtype == "bf16",
        targets=(target,),
    )
