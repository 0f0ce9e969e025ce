"""Rows of the kernel benchmarks' CSV files: columns, quantiles and the name of the machine."""

from __future__ import annotations

import csv
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from saelab.kernels.bench.traffic.step_model import Work, least_ms, machine_of

COLUMNS = (
    *("op", "shape", "dtype", "provider", "median", "q20", "q80", "ratio", "ratio_q20", "ratio_q80"),
    *("margin", "certified", "recomputed", "launches", "waits", "peak_mib", "least_ms", "share", "hardware"),
)
"""Times are in milliseconds. `ratio` is computed over pairs of neighbouring steps: the provider's time over ours; in saelab's
row, the time of the fastest baseline over ours.

On a GPU, `launches` counts kernels and `waits` the host's waits for the GPU, per step. `peak_mib` is the peak memory of a step
with its weights and moments, or of an op beyond its operands. `least_ms` is the least time by `traffic/step_model.py`, and
`share` what fraction of `median` it is; both are empty for a GPU whose rates the model does not know."""


RESULTS = Path(__file__).with_name("results.csv")
"""Measurements on GPUs; every GPU speed that the documentation claims has its row here."""


def default_device() -> str:
    """The device "cuda" if available, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def quantiles(values: list[float], scale: float = 1e3) -> dict[str, float]:
    """Median and the 20 % and 80 % quantiles, rounded; the default `scale` converts seconds to milliseconds."""
    points = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return dict(zip(("median", "q20", "q80"), (round(float(p) * scale, 3) for p in points), strict=True))


def ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Their time over ours, paired step by step."""
    each = quantiles([b / a for a, b in zip(ours, theirs, strict=True)], scale=1)
    return {"ratio": each["median"], "ratio_q20": each["q20"], "ratio_q80": each["q80"]}


def least(work: Work | None, precision: str, device: str, median_ms: float) -> dict[str, float]:
    """The columns `least_ms` and `share`; empty on a CPU, on an unknown GPU and without `work`."""
    machine = machine_of(hardware()) if torch.device(device).type == "cuda" else None
    if machine is None or work is None:
        return {}
    shortest = least_ms(*work, machine, precision)
    return {"least_ms": round(shortest, 3), "share": round(shortest / median_ms, 3)}


@cache
def hardware() -> str:
    """Name of the GPU, or of the CPU with threads and vector units; version of torch."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} torch {torch.__version__}"
    found = torch.cpu.get_capabilities()
    units = "+".join(unit for unit in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if found.get(unit))
    return f"{_cpu_name()} x{torch.get_num_threads()} {units} torch {torch.__version__}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else platform.processor() or platform.machine()).replace(",", " ")


def append_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file, with a header if it is new. Raises `ValueError` if its columns are not `COLUMNS`."""
    new = not path.exists()
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            if tuple(next(csv.reader(file), ())) != COLUMNS:
                raise ValueError(
                    f"{path} has other columns than today's rows; move it away or write to another folder."
                )
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerows(rows)
