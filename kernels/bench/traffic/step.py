"""The kernels of the fused TopK step in the compile report, at the shapes of a large step, and their memory traffic."""

from __future__ import annotations

from typing import Any

from saelab.kernels.bench.traffic.spec import PRODUCTION, SMALL, KernelSpec, kernel_spec
from saelab.kernels.triton_backend.launch import ceil_div
from saelab.kernels.triton_backend.step import (
    auxk,
    bucket,
    candidates,
    dense,
    gradients,
    prepare,
    products,
    search_rows,
    select,
    update,
)

_BATCH, _D_IN, _D_SAE, _K = PRODUCTION
_NNZ, _ROWS, _WEIGHTS = _BATCH * _K, 4 * _BATCH * _D_IN, 4 * _D_SAE * _D_IN
_SLOTS = candidates.slots_for(_K)
_FOUND = 8192 * 80  # candidates of a batch, k plus 16 a row
_TILES = ceil_div(_D_IN, gradients.COLUMNS)
_WIDE_AND_NARROW = ((update._BLOCK, update._WARPS), (update._BLOCK // 4, update._WARPS // 2))
_PARTIALS = 4 * _TILES * _FOUND
_DEAD = 1024  # features; their rows of the weights stay in the cache


def production_specs() -> list[KernelSpec]:
    """Entries of the compile report."""
    return [*_first(), *_selection(), *_gradients(), *_dense(), *_aux(), *_last()]


def _spec(fn: Any, types: str, constexprs: dict[str, Any], num_warps: int, traffic: int) -> KernelSpec:
    name = fn.fn.__name__.removeprefix("_").removesuffix("_kernel")
    return kernel_spec(f"step.{name}", fn, types, constexprs, num_warps, traffic)


def _first() -> list[KernelSpec]:
    width = prepare.width_of(_D_IN)
    row = {"BLOCK": prepare._BLOCK, "TAIL": prepare._TAIL}
    tile = {"ROWS": prepare._ROWS, "COLUMNS": prepare._COLUMNS}
    blocks = 8 * ceil_div(_BATCH, prepare._ROWS) * _D_IN
    rows = "*bf16 *fp32 *fp32 *fp32 *fp32 *fp16 *fp32 i32 i32 i32 fp32"
    return [
        _spec(prepare._prepare_rows_kernel, rows, row, prepare._WARPS, _ROWS // 2 + _ROWS + 2 * _BATCH * width),
        _spec(
            prepare._prepare_weights_kernel, "*fp32 *fp32 *fp32 *fp32 *fp16 *fp32 i32 i32 i32", row, prepare._WARPS,
            _WEIGHTS + 2 * _D_SAE * width + 12 * _D_SAE,
        ),
        _spec(prepare._column_moments_kernel, "*fp32 *fp32 *fp32 i32 i32", tile, prepare._WARPS, _ROWS + blocks),
        _spec(prepare._variance_kernel, "*fp32 *fp32 *fp32 i32 i32 i32", tile, 1, blocks),
    ]  # fmt: skip


def _selection() -> list[KernelSpec]:
    scores = 2 * _BATCH * _D_SAE  # read twice, the second time from the cache
    found = "*fp16 *fp32 *fp32 *fp32 *fp32 *i32 *i32 *fp32 *fp32 *i32 *i32 i32 i32 i32 i32 fp32 fp32"
    many: dict[str, Any] = {"MARGIN": 1.2, "SLOTS": _SLOTS, "GROUPS": 2048, "BLOCK": candidates._BLOCK}
    all_features = many | {"SLOTS": 512, "GROUPS": SMALL.d_sae, "bias_ptr": None}
    many |= dict.fromkeys(("most_ptr", "rough_ptr", "open_ptr", "n_open_ptr"))  # exact values for all
    exact = "*fp16 *fp32 *fp32 *fp32 *fp32 *i32 *i32 *fp32 i32 i32 i32 i32 fp32 fp32"
    plan = search_rows.plan_search(_D_SAE, _K, 1)
    search = "*i32 *i32 *i64"
    lists = {"BEST": plan.n_best}
    by_row = {"SLOTS": _SLOTS, "PAIRS": products.ROW_PAIRS, "COLUMNS": products.COLUMNS}
    by_feature = {"SLOTS": 1, "PAIRS": products._PAIRS, "COLUMNS": products.COLUMNS}
    tile = {"PAIRS": search_rows._PAIRS, "COLUMNS": products.COLUMNS}
    gathers = _ROWS + _WEIGHTS + 12 * _FOUND + _PARTIALS
    kept, signed = "*fp32 *i32 *i32 *i32", {"MAGNITUDE": True}
    return [
        _spec(candidates._sizes_kernel, "*fp32 *fp32 *fp32 i32", {"BLOCK": 2 * candidates._BLOCK}, 8, 8 * _D_SAE),
        _spec(candidates._candidates_kernel, found, all_features, 8, 2 * _BATCH * SMALL.d_sae),
        _spec(candidates._candidates_kernel, exact, many, 4, scores + 4 * _BATCH * _SLOTS),
        _spec(products._by_row_kernel, "*fp32 *fp32 *i32 *i32 *i32 *fp32 i32 i32", by_row, products.ROW_WARPS, gathers),
        _spec(products._by_feature_kernel, "*fp32 *fp32 *i32 *i64 *i32 *fp32 i32 i32 i32", by_feature, products._WARPS, gathers),
        _spec(
            select._select_kernel, f"*fp32 *i32 *i32 *fp32 *fp32 *fp32 *fp32 {kept} *i32 *i32 i32 i32 i32 i32",
            {"SLOTS": _SLOTS, "MAGNITUDE": True},
            4, _PARTIALS + 4 * _FOUND + 12 * _NNZ,
        ),
        _spec(
            search_rows._search_rows_kernel, f"*fp32 *fp32 *fp32 *fp32 {search} i32 i32 i32",
            signed | lists | {"LANES": 8, "SPLIT": plan.split, "COLUMNS": search_rows._TILE // plan.n_best},
            search_rows._WARPS, _WEIGHTS,
        ),
        _spec(
            search_rows._merge_rows_kernel, f"*fp32 *fp32 *fp32 {search} {kept} i32 i32 i32 i32",
            signed | lists | {"LANES": 64} | tile, search_rows._WARPS, plan.row_bytes,
        ),
    ]  # fmt: skip


def _gradients() -> list[KernelSpec]:
    chunk, tile = {"CHUNK": gradients.CHUNK}, {"COLUMNS": gradients.COLUMNS}
    far = 8 * ceil_div(_NNZ, gradients.CHUNK) * _D_IN
    gather = {"BLOCK": gradients._BLOCK}
    sums = "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32"
    lists = 2 * _TILES * 8 * _NNZ
    return [
        _spec(gradients._gather_kernel, "*i64 *fp32 *fp32 *i32 *i32 *fp32 *fp32 i32 i32", gather, gradients._WARPS, 28 * _NNZ),
        _spec(
            gradients._gradients_kernel, f"*i32 *i64 *i32 *fp32 *fp32 *fp32 *fp32 *fp32 {sums}",
            chunk | tile | {"PAIRS": gradients._PAIRS}, gradients._WARPS, 2 * _ROWS + 2 * _WEIGHTS + lists + far,
        ),
        _spec(gradients._add_far_kernel, f"*i32 *i64 {sums}", chunk | tile, gradients._WARPS, 3 * far),
    ]  # fmt: skip


def _dense() -> list[KernelSpec]:
    d_sae, row, slots = SMALL.d_sae, {"BLOCK": dense._BLOCK}, {"BLOCK": 128, "CLEARED": dense._BLOCK}
    scatter = "*fp32 *i32 *i32 *fp16 i32 i32"
    return [
        _spec(
            dense._scatter_kernel, scatter, slots | {"from_ptr": None}, dense._WARPS, 8 * _BATCH * 128 + 2 * _BATCH * d_sae
        ),
        _spec(dense._scatter_kernel, scatter.replace("*fp16", "*fp16 *fp16"), slots, dense._WARPS, 8 * _BATCH * 128),
        _spec(dense._residual_kernel, "*fp32 *fp32 *fp32 *fp16 *fp32 i32", row, dense._WARPS, 7 * _ROWS // 2),
        _spec(dense._scale_kernel, "*fp32 *fp32 *fp32 *fp32 i32", row, dense._WARPS, 16 * d_sae * _D_IN),
    ]  # fmt: skip


def _aux() -> list[KernelSpec]:
    tile: dict[str, Any] = {"D_IN": _D_IN, "TILE": auxk._TILE, "DEPTH": auxk._DEPTH}
    kept, weights = 4 * _BATCH * _DEAD, 4 * _DEAD * _D_IN
    weights_of, plain = "*fp32 *fp32 *i32 *i32", tile | {"SIGNED": False, "floors_ptr": None}
    variances = {"VARIANCES": ceil_div(_D_IN, prepare._COLUMNS)}
    return [
        _spec(
            bucket._list_kernel, "*i64 *i32 *i32 i64 i32 i32", {"BLOCK": bucket._LISTED}, bucket._LISTED_WARPS, 8 * _D_SAE
        ),
        _spec(bucket._keep_largest_kernel, "*fp32 *i32 i32 i32", {"BLOCK": bucket._BLOCK}, bucket._WARPS, 2 * kept),
        _spec(
            auxk._encode_kernel, f"{weights_of} *fp32 *fp32 i32 i32", plain | {"kept_ptr": None}, auxk._WARPS,
            _ROWS + weights + kept,
        ),
        _spec(
            auxk._encode_kernel, f"{weights_of} *fp32 *fp32 i32 i32", plain | {"bias_ptr": None}, auxk._WARPS,
            _ROWS + weights + 2 * kept,
        ),
        _spec(
            auxk._decode_kernel, f"{weights_of} *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32 fp32 fp32 fp32", tile | variances,
            auxk._WARPS, kept + weights + 2 * _ROWS,
        ),
        _spec(
            auxk._add_gradients_kernel, "*fp32 *fp32 *fp32 *fp32 *i32 *i32 *fp32 *fp32 *fp32 i32 i32", tile, auxk._WARPS,
            2 * kept + 2 * _ROWS + 4 * weights,
        ),
    ]  # fmt: skip


def _last() -> list[KernelSpec]:
    numbers = "*fp32 *fp32 *fp32 *i64 *i32 " + "*fp32 " * 10 + "i32 i32 i32 fp32 fp32 fp32 fp32"
    unit = {"UNIT": True}
    return [
        *(
            _spec(
                update._count_and_norm_kernel, "*fp32 *fp32 *fp32 *fp32 *i64 *i64 *fp32 *fp32 *fp32 i32 i64 i64 i32",
                unit | {"BLOCK": block}, warps, 3 * _WEIGHTS,
            )
            for block, warps in _WIDE_AND_NARROW
        ),
        _spec(update._finish_kernel, numbers, {"BLOCK": update._BLOCK}, 8, 36 * _D_IN),
        *(
            _spec(
                update._update_kernel, "*fp32 " * 15 + "i32 fp32 fp32 fp32 fp32 fp32", unit | {"BLOCK": block}, warps,
                14 * _WEIGHTS,
            )
            for block, warps in _WIDE_AND_NARROW
        ),
        _spec(
            update._update_vector_kernel, "*fp32 " * 6 + "i32 fp32 fp32 fp32", {"BLOCK": update._BLOCK}, update._WARPS,
            28 * _D_SAE,
        ),
    ]  # fmt: skip
