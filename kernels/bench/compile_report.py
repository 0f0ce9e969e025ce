"""Compile every Triton kernel for four GPU targets, without a GPU, and report each kernel's resource usage.

`python -m saelab.kernels.bench.compile_report [--json]`: registers, spills, shared memory against the target's limit,
tensor-core instructions, and modelled device-memory bytes (`traffic/hbm_model.py`) over the minimum for its cache size.
Nothing runs and nothing is timed. A row is `ok` if nothing spills, the shared memory suffices, a product uses the tensor
cores with a tile of at least 64 x 64, and the modelled bytes are at most 1.3 times the minimum.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MODULES = ("group_max", "grouped_product", "sddmm", "spmm", "spmm_transposed", "rows", "step", "step_lists")
"""Modules of `kernels/bench/traffic`; each lists its kernels in `production_specs()`."""

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
HBM_LIMIT = 1.3
_TENSOR_CORE = {
    "ptx": r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b",
    "amdgcn": r"\b(v_mfma)_",
}


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one target. Sizes are in bytes; `stack` can be non-zero without any spilled register."""

    kernel: str
    target: str
    tile: str
    registers: int
    stack: int
    spills: int
    """Loads and stores of spilled registers: STL and LDL in SASS; spilled vector and scalar registers on amdgcn."""
    shared: int
    shared_limit: int
    tensor_core: str
    n_tensor_core: int
    hbm_bytes: int
    least_bytes: int
    hbm_ratio: float
    compulsory_bytes: int
    problems: str

    @property
    def ok(self) -> bool:
        return not self.problems


def report() -> list[Row]:
    """One row per kernel, shape and target. Raises `ValueError` if TRITON_INTERPRET is set."""
    from saelab.kernels.triton_backend import launch

    if launch.INTERPRETED:
        raise ValueError(
            "TRITON_INTERPRET is set, so Triton interprets the kernels and does not compile them; unset it."
        )
    modules = [importlib.import_module(f"saelab.kernels.bench.traffic.{name}") for name in MODULES]
    specs = [spec for module in modules for spec in module.production_specs()]
    return [judge(spec, target, compile_spec(spec, target)) for spec in specs for target in spec.targets]


def compile_spec(spec: Any, target: str) -> Any:
    """The compiled kernel; pointers are declared 16-byte aligned, as torch allocates them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.fn.arg_names
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    constexprs: Any = {(names.index(name),): value for name, value in spec.constexprs.items()}
    aligned: Any = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    source = ASTSource(spec.fn, signature, constexprs, aligned)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def judge(spec: Any, target: str, compiled: Any) -> Row:
    """The row of the report for a compiled kernel."""
    from saelab.kernels.triton_backend import launch

    language = "amdgcn" if target.startswith("gfx") else "ptx"
    registers, stack, spills = (amdgcn_usage if language == "amdgcn" else cubin_usage)(compiled.asm)
    tensor_core = re.findall(_TENSOR_CORE[language], compiled.asm[language])
    cache = launch.usable_cache(target)
    row = Row(
        kernel=spec.name,
        target=target,
        tile="x".join(map(str, spec.tile)),
        registers=registers,
        stack=stack,
        spills=spills,
        shared=compiled.metadata.shared,
        shared_limit=SHARED_LIMIT[target],
        tensor_core="+".join(sorted(set(tensor_core))),
        n_tensor_core=len(tensor_core),
        hbm_bytes=spec.hbm_bytes(cache),
        least_bytes=spec.least_bytes(cache),
        hbm_ratio=spec.hbm_bytes(cache) / spec.least_bytes(cache),
        compulsory_bytes=spec.compulsory_bytes,
        problems="",
    )
    return replace(row, problems="; ".join(problems_of(row, spec.tile, spec.tensor_cores)))


def problems_of(row: Row, tile: tuple[int, int], tensor_cores: bool) -> list[str]:
    """The reasons why a row is not ok, as text."""
    found = {
        f"{row.spills} spills": row.spills > 0,
        f"{row.shared} bytes of shared memory (the limit is {row.shared_limit})": row.shared > row.shared_limit,
        f"{row.hbm_ratio:.2f} times the minimum bytes": row.hbm_ratio > HBM_LIMIT,
        "fewer bytes than the minimum": row.hbm_bytes < row.least_bytes,
        "no tensor-core instruction": tensor_cores and row.n_tensor_core == 0,
        f"a tile of {row.tile}, smaller than 64x64": tensor_cores and min(tile) < 64,
    }
    return [text for text, wrong in found.items() if wrong]


def amdgcn_usage(asm: dict[str, str]) -> tuple[int, int, int]:
    """(vector registers, scratch bytes, spilled registers) from the metadata at the end of amdgcn assembly."""
    names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    found = [re.search(rf"^\s*\.{name}:\s+(\d+)", asm["amdgcn"], re.MULTILINE) for name in names]
    if None in found:
        raise RuntimeError(
            "The amdgcn assembly has no kernel metadata; this version of Triton may print it differently."
        )
    vgprs, scratch, vgpr_spills, sgpr_spills = (int(match[1]) for match in found if match)
    return vgprs, scratch, vgpr_spills + sgpr_spills


def cubin_usage(asm: dict[str, Any]) -> tuple[int, int, int]:
    """(registers, stack bytes, local-memory instructions) of a cubin, from the cuobjdump in triton's wheel.

    Registers are spilled to the stack, so a kernel without one is not disassembled (that takes as long as compiling).
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", _cuobjdump("--dump-resource-usage", cubin))
        if usage is None:
            raise RuntimeError("cuobjdump did not describe the kernel")
        registers, stack, local = map(int, usage.groups())
        if not stack and not local:
            return registers, 0, 0
        sass = _cuobjdump("-sass", cubin)
    if not re.search(r"\bEXIT\b", sass):
        raise RuntimeError("cuobjdump did not disassemble the kernel")
    return registers, stack, len(re.findall(r"\b(?:STL|LDL)\b", sass))


def _cuobjdump(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def table(rows: list[Row]) -> str:
    """The report as text, one line per kernel and target."""
    lines = [
        f"{'kernel':38} {'target':7} {'tile':>8} {'regs':>5} {'stack':>5} {'spills':>6} {'shared / limit':>16} "
        f"{'tensor cores':>20} {'HBM GB':>7} {'minimum':>7} {'ratio':>6} {'once':>6}  verdict"
    ]
    for row in rows:
        cores = f"{row.n_tensor_core} {row.tensor_core}" if row.n_tensor_core else "-"
        lines.append(
            f"{row.kernel:38} {row.target:7} {row.tile:>8} {row.registers:5} {row.stack:5} {row.spills:6} "
            f"{row.shared:7} / {row.shared_limit:6} {cores:>20} {row.hbm_bytes / 1e9:7.3f} {row.least_bytes / 1e9:7.3f} "
            f"{row.hbm_ratio:6.2f} {row.compulsory_bytes / 1e9:6.3f}  {row.problems or 'ok'}"
        )
    return "\n".join(lines)


def main() -> int:
    """Print the report; returns 1 if a row is not ok, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        rows = report()
    print(json.dumps([asdict(row) | {"ok": row.ok} for row in rows], indent=1) if arguments.json else table(rows))
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
