"""`grouped_product` in the compile report: its shapes, and the memory traffic of its launch order."""

from __future__ import annotations

from saelab.kernels.bench.traffic.hbm_model import Product
from saelab.kernels.bench.traffic.spec import ITEMSIZE, KernelSpec, ScreenShape, screen_cases
from saelab.kernels.triton_backend import grouped_product as kernel
from saelab.kernels.triton_backend.launch import ceil_div, resident_parts


def production_specs() -> list[KernelSpec]:
    """This kernel at the shapes of the compile report, with k pairs per row and the tile of each target."""
    return [_spec(*case) for case in screen_cases()]


def _spec(shape: ScreenShape, target: str, dtype: str) -> KernelSpec:
    tile, itemsize = kernel.TILES[target], ITEMSIZE[dtype]
    row_bytes, n_pairs, d_sae = shape.K * itemsize, shape.rows * shape.k, shape.d_sae
    words = ceil_div(ceil_div(d_sae, shape.n_groups), 32)
    traffic = Product(shape.rows * row_bytes, d_sae * row_bytes, once_bytes=n_pairs * (words + 1) * 4)
    lists = dict.fromkeys(("pair_rows_ptr", "tile_groups_ptr", "tile_starts_ptr", "tile_ends_ptr"), "*i32")
    return KernelSpec(
        name=f"grouped_product[{shape.label}-{dtype}]",
        fn=kernel._grouped_product_fwd_kernel,
        signature={"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "floor_ptr": "*fp32", **lists, "masks_ptr": "*i32"},
        constexprs=kernel.constexprs(shape.K, d_sae, shape.n_groups, False, tile, itemsize) | {"WIDEN": False},
        **tile.options,
        hbm_bytes=lambda cache: traffic.a_resident(len(resident_parts(shape.rows, row_bytes, cache))),
        least_bytes=traffic.minimum,
        compulsory_bytes=traffic.compulsory,
        tile=(tile.rows, tile.columns),
        tensor_cores=dtype == "bf16",
        targets=(target,),
    )
