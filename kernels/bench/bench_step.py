"""Time a whole TopK training step against plain dense PyTorch: `python -m saelab.kernels.bench.bench_step`.

A step is loss, backward, projection, gradient clipping, Adam, unit norms, dead-feature counters and the logged values. Both
steps alternate on the same batches in one process. Each row also has the selection's margin (candidates per row beyond k)
and the fractions of certified and recomputed rows. Before a size is timed, its selection is compared with float64, so no
time is printed for a wrong op. The data are activations from a cache (`--cache`), or random rows with a decaying spectrum.

With `--peers` four other libraries alternate too, each with its own step (`peers.py`, `peer_worker.py`) in a process that is
idle between its steps. Their `ratio` is their time over ours; in saelab's row it is the dense step's time over ours.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from saelab.kernels.allocator import keep_freed_memory
from saelab.kernels.bench import peers
from saelab.kernels.bench.dense_step import DenseTopK
from saelab.kernels.bench.rows import COLUMNS, RESULTS, append_csv, default_device, hardware, quantiles
from saelab.kernels.dispatch import fast_bf16, without_bf16
from saelab.kernels.reference.encode_topk import encode_topk
from saelab.kernels.selection_log import SelectionLog, log_selections
from saelab.models.smollm2 import cache_folder
from saelab.saes import TopKConfig, TopKSAE
from saelab.saes.step import Batch, StepInfo
from saelab.training.adam import Adam
from saelab.training.dead_features import DeadFeatures
from saelab.training.optimizer import apply_step


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    d_sae: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    """Dictionary sizes."""
    k: tuple[int, ...] = (32,)
    """Features per token; every d_sae is run with every k."""
    d_in: int = 576
    """Width of the activations; ignored with --cache."""
    batch_size: int = 2048
    """Tokens per step."""
    pairs: int = 7
    """Timed steps of each implementation, which alternate."""
    warmup: int = 20
    """Untimed warm-up steps, so that the dictionary is no longer random."""
    cache: Path | None = None
    """Activation cache to read the batches from, for example runs/demo/cache."""
    dense_limit: int = 32768
    """Largest d_sae at which the dense step and the peers also run (they need three or more (batch, d_sae) tensors)."""
    tf32: bool = False
    """Run the dense step's products in TF32 on a GPU (10 mantissa bits): faster, but its selection differs."""
    peers: bool = False
    """Also time sae-lens, dictionary-learning, eai-sparsify and overcomplete; the first call installs them (gigabytes)."""
    peers_venv: Path | None = None
    """Virtual environment of the peers; None uses peers/ in the SAELAB_CACHE folder."""
    out: Path | None = None
    """Folder for step.csv and step.json; None only prints."""
    bf16: bool = True
    """Screen in bfloat16 where the hardware supports it; --no-bf16 screens in float32."""
    device: str = field(default_factory=default_device)
    """Device of the steps. Rows from a GPU are also appended to kernels/bench/results.csv."""
    floor: dict[int, float] = field(default_factory=dict)
    """Smallest allowed ratio per d_sae; the exit status is 1 if a ratio is below it."""


class SparseTopK:
    """The training step of `saelab.train`, without its data and files."""

    def __init__(self, d_in: int, d_sae: int, k: int, device: str = "cpu") -> None:
        self.sae = TopKSAE(TopKConfig(d_sae=d_sae, k=k), d_in).to(device)
        self.adam, self.dead = Adam(self.sae.parameters()), DeadFeatures(d_sae, 10**9, torch.device(device))

    def step(self, x: Tensor) -> dict[str, float]:
        loss = self.sae.loss(Batch(x, x), StepInfo(self.dead.dead, 0, 1))
        loss.total.backward()
        self.dead.update(loss.feature_acts)
        norm = apply_step(self.sae, self.adam, 2e-3, 1.0)
        l0, dead = loss.feature_acts.nnz / len(x), float(self.dead.dead.float().mean())
        return {"loss": loss.total.item(), "l0": l0, "grad_norm": norm, "dead": dead}


def main(settings: Settings) -> int:
    """Time every size; returns 1 if a ratio is below its floor, else 0."""
    if settings.peers and settings.device != "cpu":
        raise ValueError(
            f"device={settings.device!r} cannot be used with --peers, whose steps run on a CPU; add --device cpu."
        )
    keep_freed_memory()
    others = peers.install(settings.peers_venv or cache_folder() / "peers") if settings.peers else {}
    print(f"# {hardware()}")
    print(",".join(COLUMNS))
    rows, missed = [], False
    with nullcontext() if settings.bf16 else without_bf16():
        for k, d_sae in itertools.product(settings.k, settings.d_sae):
            measured = _measure(settings, d_sae, k, others)
            rows += measured
            ratio = measured[-1].get("ratio")
            missed |= ratio is not None and ratio < settings.floor.get(d_sae, 0.0)
            for row in measured:
                print(",".join(str(row.get(name, "")) for name in COLUMNS), flush=True)
    for line in growth(rows):
        print(f"# {line}")
    if settings.device != "cpu":
        append_csv(RESULTS, rows)
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
        append_csv(settings.out / "step.csv", rows)
        (settings.out / "step.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(missed)


def growth(rows: list[dict[str, Any]]) -> list[str]:
    """How the time of our step scales with d_sae, relative to the smallest d_sae of at least 8192, for each k."""
    ours = [(*map(int, row["shape"].split("x")[2:]), row["median"]) for row in rows if row["provider"] == "saelab"]
    lines = []
    for k in sorted({k for _, k, _ in ours}):
        sizes = sorted((d_sae, ms) for d_sae, other, ms in ours if other == k and d_sae >= 8192)
        for d_sae, ms in sizes[1:]:
            larger, longer = d_sae / sizes[0][0], ms / sizes[0][1]
            verdict = "at most linear" if longer <= larger else "MORE THAN LINEAR"
            lines.append(f"k {k}: d_sae {sizes[0][0]} to {d_sae} ({larger:g}x), time {longer:.2f}x: {verdict}")
    return lines


def _measure(settings: Settings, d_sae: int, k: int, others: dict[str, list[str]]) -> list[dict[str, Any]]:
    batches = _batches(settings)
    first = next(batches)
    sparse = SparseTopK(first.shape[1], d_sae, k, settings.device)
    with_dense = d_sae <= settings.dense_limit
    dense = DenseTopK(first.shape[1], d_sae, k, settings.device, settings.tf32) if with_dense else None
    with peers.Peers(others if with_dense else {}, first, d_sae, k) as beside:
        beside.step(first)
        for _ in range(settings.warmup):
            x = next(batches)
            sparse.step(x)
            beside.step(x)
        _check_selection(sparse.sae, first, k)
        beside.check_learning(first)
        if dense is not None:
            dense.step(first)
        times: dict[str, list[float]] = {"dense": [], "saelab": []}
        with log_selections() as log:
            for _ in range(settings.pairs):
                x = next(batches)
                times["saelab"].append(_timed(sparse.step, x))
                if dense is not None:
                    times["dense"].append(_timed(dense.step, x))
                beside.step(x, timed=True)
        ours = times.pop("saelab")
        return _rows(settings, first.shape[1], (d_sae, k), log, ours, times | beside.seconds())


def _rows(
    settings: Settings,
    d_in: int,
    size: tuple[int, int],
    log: SelectionLog,
    ours: list[float],
    theirs: dict[str, list[float]],
) -> list[dict[str, Any]]:
    d_sae, k = size
    shape = f"{settings.batch_size}x{d_in}x{d_sae}x{k}"
    base = {"op": "topk_step", "shape": shape, "dtype": _screen_of(settings), "hardware": hardware()}
    rows: list[dict[str, Any]] = []
    for name, times in theirs.items():
        if times:
            provider = "dense tf32" if settings.tf32 and name == "dense" else name
            rows.append(
                base | {"provider": provider} | quantiles(times) | ({} if name == "dense" else _ratio(times, ours))
            )
    selection = {
        "margin": round(log.candidates / max(log.rows, 1) - k, 1),
        "certified": round(log.certified / max(log.rows, 1), 6),
        "recomputed": round(log.recomputed / max(log.rows, 1), 6),
    }
    rows.append(base | {"provider": "saelab"} | quantiles(ours) | selection)
    if theirs["dense"]:
        rows[-1] |= _ratio(theirs["dense"], ours)
    return rows


def _screen_of(settings: Settings) -> str:
    """The `dtype` column: weights and sums are float32; in parentheses the dtype of the screen, if different."""
    return "float32 (bf16 screen)" if settings.bf16 and fast_bf16(settings.device) else "float32"


def _ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Their time over ours, paired step by step."""
    each = quantiles([b / a for a, b in zip(ours, theirs, strict=True)], scale=1)
    return {"ratio": each["median"], "ratio_q20": each["q20"], "ratio_q80": each["q80"]}


def _check_selection(sae: TopKSAE, x: Tensor, k: int) -> None:
    """Compare the selection of 64 rows with float64; raise `AssertionError` on a difference beyond rounding."""
    with torch.no_grad():
        feature_acts = sae.encode(x)
        centered = (sae.normalize(x[:64]) - sae.b_dec).double()
        want = encode_topk(centered, sae.W_enc.double(), sae.b_enc.double(), k)
        got = feature_acts.select_rows(torch.arange(64, device=x.device)).to_dense()
    assert torch.allclose(got.double(), want, atol=1e-4), (
        "encode_topk differs from float64 on this machine; nothing is timed"
    )


def _batches(settings: Settings) -> Iterator[Tensor]:
    for rows in _rows_of_data(settings):
        yield rows.to(settings.device)


def _rows_of_data(settings: Settings) -> Iterator[Tensor]:
    if settings.cache is not None:
        from saelab.activation_cache.reader import ActivationCache
        from saelab.saes.config import normalization

        cache = ActivationCache(settings.cache)
        stats = cache.stats()
        center, scale = normalization("center_and_scale", stats["mean"].float(), stats["second_moment"].sum())
        for rows in cache.batches(settings.batch_size):
            yield (rows - center.float()) * float(scale)
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, settings.d_in + 1).pow(-0.5)
    spectrum *= (settings.d_in / spectrum.square().sum()).sqrt()
    turn = torch.linalg.qr(torch.randn(settings.d_in, settings.d_in, generator=generator)).Q
    while True:
        yield torch.randn(settings.batch_size, settings.d_in, generator=generator) * spectrum @ turn


def _timed(step: Callable[[Tensor], Any], x: Tensor) -> float:
    """Seconds of one step, including the GPU's work."""
    start = time.perf_counter()
    step(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Settings, description=__doc__)))
