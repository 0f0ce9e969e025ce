"""The compile report: what it demands of every kernel on every target, that it can say no, and the HBM model by hand."""

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from saelab.kernels.bench.compile_report import MODULES, SHARED_LIMIT, TARGETS, amdgcn_usage
from saelab.kernels.bench.traffic.hbm_model import Product
from saelab.kernels.triton_backend import launch

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(900)  # seventy compilations
TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


def run_compiled(*command: str, check: bool = True) -> str:
    """Standard output of Python run without the interpreter, which the compiler cannot be used with."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert not check or run.returncode == 0, run.stderr + run.stdout
    return run.stdout


@pytest.fixture(scope="module")
def rows():
    return json.loads(run_compiled("-m", "saelab.kernels.bench.compile_report", "--json", check=False))


def test_every_kernel_is_compiled_for_every_target(rows):
    names = {row["kernel"] for row in rows}
    for name in names:
        assert sorted({row["target"] for row in rows if row["kernel"] == name}) == sorted(TARGETS)
    for module in ("group_max", "grouped_product"):
        assert any(name.startswith(module) and "8192x4096x131072" in name for name in names)
    jitted = {
        node.name
        for path in (ROOT / "kernels" / "triton_backend").rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    specs = [
        spec
        for module in MODULES
        for spec in import_module(f"saelab.kernels.bench.traffic.{module}").production_specs()
    ]
    assert {spec.fn.fn.__name__ for spec in specs} == jitted


def test_no_kernel_has_a_problem(rows):
    for row in rows:
        assert row["ok"] and row["spills"] == 0, row
        assert 0 <= row["shared"] <= SHARED_LIMIT[row["target"]], row
        assert row["registers"] > 0
        assert row["least_bytes"] <= row["hbm_bytes"] <= 1.3 * row["least_bytes"], row
        assert row["compulsory_bytes"] <= row["least_bytes"], row


def test_products_use_the_tensor_cores_in_large_tiles(rows):
    products = [
        row for row in rows if row["kernel"].startswith(("group_max", "grouped_product")) and "bf16" in row["kernel"]
    ]
    assert len(products) == 16
    for row in products:
        assert row["tensor_core"] == TENSOR_CORE[row["target"]] and row["n_tensor_core"] > 0
        assert min(map(int, row["tile"].split("x"))) >= 64


SPOILED = """
import dataclasses, os, sys, tempfile
from saelab.kernels.bench.compile_report import compile_spec, judge
from saelab.kernels.bench.traffic.group_max import production_specs
with tempfile.TemporaryDirectory() as folder:
    os.environ["TRITON_CACHE_DIR"] = folder
    for target, block in (("sm_80", 128), ("gfx942", 256)):
        spec = next(spec for spec in production_specs() if spec.targets == (target,))
        constexprs = spec.constexprs | {"BLOCK_M": block, "BLOCK_G": 256 // spec.constexprs["BLOCK_MEMBERS"]}
        spec = dataclasses.replace(spec, constexprs=constexprs, num_warps=4, hbm_bytes=lambda cache: 10**11)
        print(judge(spec, target, compile_spec(spec, target)).problems)
"""


def test_a_tile_that_is_too_large_is_reported():
    nvidia, amd = run_compiled("-c", SPOILED).splitlines()
    for problems in (nvidia, amd):
        assert int(problems.split(" spills")[0]) > 0 and "times the minimum bytes" in problems


def test_interpreted_kernels_are_refused():
    if not launch.INTERPRETED:
        pytest.skip("the kernels are compiled here")
    from saelab.kernels.bench.compile_report import report

    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        report()


def test_amdgcn_metadata_by_hand():
    text = "  .private_segment_fixed_size: 8\n  .sgpr_spill_count: 2\n  .vgpr_count: 99\n  .vgpr_spill_count: 3\n"
    assert amdgcn_usage({"amdgcn": text}) == (99, 8, 5)
    with pytest.raises(RuntimeError, match="no kernel metadata"):
        amdgcn_usage({"amdgcn": "s_endpgm"})


def test_hbm_model_by_hand():
    product = Product(a_bytes=100, b_bytes=1000, once_bytes=7)
    assert product.compulsory == 1107
    assert product.minimum(cache=100) == 1107  # a fits: everything once
    assert product.minimum(cache=99) == 100 + 2 * 1000 + 7  # a in two parts, b twice
    assert product.minimum(cache=10) == 100 + 10 * 1000 + 7 == product.a_resident(10)
    assert Product(1000, 100, 7).minimum(cache=50) == 2 * 1000 + 100 + 7 == Product(1000, 100, 7).b_resident(2)


def test_super_blocks_fit_the_cache_and_cover_the_rows():
    for rows, row_bytes, cache in [(8192, 8224, launch.usable_cache("sm_80")), (1000, 8, 10**6), (300, 100, 300 * 99)]:
        parts = launch.resident_parts(rows, row_bytes, cache)
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
        assert all(part.start % launch.PART_BLOCK == 0 for part in parts)
        assert all((part.stop - part.start) * row_bytes <= cache for part in parts)
    assert len(launch.resident_parts(8192, 8224, launch.usable_cache("sm_90"))) == 2
    assert launch.resident_parts(0, 8, 100) == []
