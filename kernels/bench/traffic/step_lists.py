"""The kernels of the fused steps that list the pairs of a whole batch in the compile report, at the shapes of a large step."""

from __future__ import annotations

from typing import Any

from saelab.kernels.bench.traffic.spec import PRODUCTION, KernelSpec, kernel_spec
from saelab.kernels.triton_backend.launch import ceil_div
from saelab.kernels.triton_backend.step import auxk, keep, kth, pair_list, penalty, pre_act, products, strength

_BATCH, _D_IN, _D_SAE, _K = PRODUCTION
_KEPT = _BATCH * _K
_ROOM = 2 * _KEPT
_SCORES = 2 * _BATCH * _D_SAE
_TILES = ceil_div(_D_IN, products.COLUMNS)
_DEAD = 1024  # features; their rows of the weights stay in the cache


def production_specs() -> list[KernelSpec]:
    """Entries of the compile report."""
    return [*_kth(), *_lists(), *_thresholds(), *_pre_act()]


def _spec(fn: Any, types: str, constexprs: dict[str, Any], num_warps: int, traffic: int) -> KernelSpec:
    name = fn.fn.__name__.removeprefix("_").removesuffix("_kernel")
    return kernel_spec(f"step.{name}", fn, types, constexprs, num_warps, traffic)


def _kth() -> list[KernelSpec]:
    low = {"LOW_BITS": kth.LOW_BITS}
    bins = low | {"BINS": kth.BINS, "BLOCK": kth._BLOCK}
    counts = low | {"BLOCK": kth._PAIRS}
    first = "*fp32 *fp32 *i32 *fp32 *i32 i32 i32 i32"
    return [
        _spec(
            kth._count_floors_kernel, "*fp16 *fp32 *fp32 *fp32 *i32 i32 i32 i32 fp32 fp32", low | {"GROUPS": 2048}, kth._WARPS,
            _SCORES,
        ),
        *(_spec(kth._nth_kernel, "*i32 *i32 i32", bins | {"LOW": is_low}, 8, 8 * kth.BINS) for is_low in (False, True)),
        _spec(
            kth._count_scores_kernel, first, counts | {"LOW": False, "found_ptr": None}, kth._WARPS, 4 * (_TILES + 2) * _ROOM,
        ),
        _spec(
            kth._count_scores_kernel, "*fp32 *i32 *i32 i32 i32 i32",
            counts | {"LOW": True} | dict.fromkeys(("partials_ptr", "features_ptr", "bias_ptr")), kth._WARPS, 4 * _ROOM,
        ),
    ]  # fmt: skip


def _lists() -> list[KernelSpec]:
    block = {"BLOCK": keep._BLOCK}
    lists = "*i32 *i32 *i32"
    out = "*fp32 *i32 *i32 *i64 i32 i32 i32"
    by_last, by_floor = block | {"floors_ptr": None}, block | {"last_ptr": None}
    return [
        _spec(
            pair_list._collect_kernel, "*fp16 *i32 *i32 *i32 *i32 *i32 *i32 i32 i32 i32 fp32 fp32",
            {"LOW_BITS": kth.LOW_BITS, "BLOCK": pair_list._BLOCK}, pair_list._WARPS, _SCORES + 8 * _ROOM,
        ),
        _spec(keep._count_kept_kernel, f"{lists} *i32 *fp32 *i32 *i32 *fp32 i32 i32", by_last, keep._WARPS, 8 * _ROOM),
        _spec(keep._count_kept_kernel, f"{lists} *i32 *fp32 *fp32 *i32 *fp32 i32 i32", by_floor, keep._WARPS, 8 * _ROOM),
        _spec(keep._write_kept_kernel, f"{lists} *fp32 *i32 *i32 *i64 {out}", by_last, keep._WARPS, 20 * _ROOM),
        _spec(keep._write_kept_kernel, f"{lists} *fp32 *fp32 *i32 *i64 {out}", by_floor, keep._WARPS, 20 * _ROOM),
    ]  # fmt: skip


def _thresholds() -> list[KernelSpec]:
    block = {"BLOCK": penalty._BLOCK}
    slopes = "*fp32 *i32 *fp32 *fp32 " + "*fp32 " * 7 + "i32 i32 fp32 fp32"
    relu = dict.fromkeys(("theta_ptr",)) | {"KIND": penalty.LINEAR, "TO_INPUT": False}
    return [
        _spec(penalty._activate_kernel, "*fp32 *i32 *fp32 *fp32 *i32 i32 i32", block, penalty._WARPS, 16 * _ROOM),
        _spec(
            penalty._slopes_kernel, slopes, block | {"KIND": penalty.TANH, "TO_INPUT": True}, penalty._WARPS, 32 * _ROOM,
        ),
        _spec(
            penalty._slopes_kernel, slopes.replace("*fp32 *fp32 ", "*fp32 ", 1), block | relu, penalty._WARPS, 28 * _ROOM,
        ),
        _spec(
            penalty._sum_by_feature_kernel, "*i64 *i64 " + "*fp32 " * 10 + "*i32 i32 fp32",
            {"PAIRS": penalty._PAIRS, "COLUMNS": penalty._COLUMNS}, penalty._WARPS // 2, 24 * _KEPT + 12 * _D_SAE * _D_IN,
        ),
        _spec(
            strength._strength_kernel, "*i32 *fp32 *fp32 *fp32 *i64 *fp32 i32 " + "fp32 " * 7, {}, 1, 64,
        ),
    ]  # fmt: skip


def _pre_act() -> list[KernelSpec]:
    tile: dict[str, Any] = {"D_IN": _D_IN, "TILE": pre_act._TILE, "DEPTH": pre_act._DEPTH}
    shortfalls, weights, rows = 4 * _BATCH * _DEAD, 4 * _DEAD * _D_IN, 4 * _BATCH * _D_IN
    below = tile | {"SIGNED": False, "kept_ptr": None}
    return [
        _spec(
            auxk._encode_kernel, "*fp32 *fp32 *i32 *i32 *fp32 *fp32 *fp32 i32 i32", below, auxk._WARPS,
            rows + weights + shortfalls,
        ),
        _spec(
            pre_act._add_rows_kernel, "*fp32 *fp32 *fp32 *i32 *i32 *fp32 *fp32 *fp32 i32 i32 fp32", tile, pre_act._WARPS,
            rows + shortfalls + 2 * weights,
        ),
        _spec(
            pre_act._add_sums_kernel, "*fp32 *fp32 *fp32 *fp32 *i32 *i32 *fp32 *fp32 *fp32 i32 i32 fp32",
            {"BLOCK": pre_act._BLOCK}, pre_act._WARPS, 3 * weights,
        ),
    ]  # fmt: skip
