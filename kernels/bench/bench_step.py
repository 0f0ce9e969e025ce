"""Time a whole TopK training step against dense PyTorch: `python -m saelab.kernels.bench.bench_step`.

A step is loss, backward, projection, gradient clipping, Adam, unit norms, dead-feature counters and the logged values. Our
step and a baseline alternate on the same batches in one process; then the baseline is freed and the next one is built, so that
memory holds two models. Each row of ours also has the selection's margin (candidates per row beyond k) and the fractions of
certified and recomputed rows. Before a size is timed, its selection is compared with float64, so no time is printed for a
wrong op. The data are activations from a cache (`--cache`), or random rows with a decaying spectrum.

On a GPU the default is the twelve sizes of `sizes.py` with all baselines of `providers.py`, and rows also have kernel launches,
host waits, peak memory and the least time by a model (`rows.py`).

With `--peers` four other libraries alternate with ours, each with its own step (`peers.py`, `peer_worker.py`) in a process that
is idle between its steps.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
import tyro

from saelab.kernels.allocator import keep_freed_memory
from saelab.kernels.bench import peers
from saelab.kernels.bench.measure import measure
from saelab.kernels.bench.rows import COLUMNS, RESULTS, append_csv, hardware
from saelab.kernels.bench.sizes import Shape
from saelab.kernels.bench.step_settings import Settings
from saelab.kernels.dispatch import without_bf16
from saelab.models.wheels import cache_folder


def main(settings: Settings) -> int:
    """Time every size; returns 1 if a ratio is below its floor, else 0."""
    if settings.peers and not settings.on_cpu:
        raise ValueError(
            f"device={settings.device!r} cannot be used with --peers, whose steps run on a CPU; add --device cpu."
        )
    keep_freed_memory()
    others = peers.install(settings.peers_venv or cache_folder() / "peers") if settings.peers else {}
    print(f"# {hardware()}")
    print(",".join(COLUMNS))
    rows: list[dict[str, Any]] = []
    with nullcontext() if settings.bf16 else without_bf16():
        for shape in settings.shapes:
            measured = _measure_if_it_fits(settings, shape, others)
            rows += measured
            for row in measured:
                print(",".join(str(row.get(name, "")) for name in COLUMNS), flush=True)
            _write(settings, measured, rows)
    ours = [row for row in rows if row["provider"] == "saelab" and row["op"] == "topk_step"]
    for line in growth(ours):
        print(f"# {line}")
    ratios = [(row["ratio"], settings.floor.get(_shape(row).d_sae, 0.0)) for row in ours if "ratio" in row]
    return int(any(ratio < floor for ratio, floor in ratios))


def growth(ours: list[dict[str, Any]]) -> list[str]:
    """How the time of our step scales with d_sae, from the smallest d_sae of at least 8192, for each batch, d_in and k."""
    alike: dict[tuple[int, int, int], list[tuple[int, float]]] = defaultdict(list)
    for row in ours:
        batch, d_in, d_sae, k = _shape(row)
        alike[batch, d_in, k] += [(d_sae, row["median"])] if d_sae >= 8192 else []
    lines = []
    for (batch, d_in, k), times in sorted(alike.items()):
        sizes = sorted(times)
        for d_sae, ms in sizes[1:]:
            larger, longer = d_sae / sizes[0][0], ms / sizes[0][1]
            verdict = "at most linear" if longer <= larger else "MORE THAN LINEAR"
            scale = f"d_sae {sizes[0][0]} to {d_sae} ({larger:g}x), time {longer:.2f}x"
            lines.append(f"{batch}x{d_in}, k {k}: {scale}: {verdict}")
    return lines


def _shape(row: dict[str, Any]) -> Shape:
    return Shape(*map(int, row["shape"].split("x")))


def _measure_if_it_fits(settings: Settings, shape: Shape, others: dict[str, list[str]]) -> list[dict[str, Any]]:
    try:
        return measure(settings, shape, others)
    except torch.OutOfMemoryError as error:
        print(f"saelab skipped at {shape.label}: {error}", file=sys.stderr, flush=True)
        return []


def _write(settings: Settings, measured: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Append the rows of a size to the files, and write all rows so far as JSON."""
    if not settings.on_cpu:
        append_csv(RESULTS, measured)
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
        append_csv(settings.out / "step.csv", measured)
        (settings.out / "step.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Settings, description=__doc__)))
