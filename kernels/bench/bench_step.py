"""How much faster is a whole TopK training step than plain dense PyTorch? `python -m saelab.kernels.bench.bench_step`.

A step is loss, backward, projection, clip, Adam, unit norms, dead counters and the numbers of a log line, on the same
batches in one process; the two take turns. The selection's margin (candidates a row beyond k), certified and
recomputed shares stand beside the times. Before a size is timed its codes are compared with float64: no speed is printed
for an op that is wrong. The data are the activations of a cache (`--cache`), or draws with a decaying spectrum.

With `--peers` four other libraries take their turn with their own step (`peers.py`, `peer_worker.py`), each in a process
that sleeps between its turns. Their `ratio` is their time over ours; for the row of saelab it is the dense step's over ours.
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
    """What is timed."""

    d_sae: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    """Dictionary sizes."""
    k: tuple[int, ...] = (32,)
    """Features a token; every size is run with every k."""
    d_in: int = 576
    """Width of the activations (ignored with a cache)."""
    batch_size: int = 2048
    """Tokens a step."""
    pairs: int = 7
    """Timed steps of each, in turns."""
    warmup: int = 20
    """Steps before, so that the dictionary is no longer random."""
    cache: Path | None = None
    """An activation cache to take the batches from, for instance runs/demo/cache."""
    dense_limit: int = 32768
    """Largest d_sae at which the dense step and peers are run as well (they need (batch, d_sae) tensors, three or more)."""
    tf32: bool = False
    """Let the dense step's products round to TF32 on a GPU (10 bits of mantissa): faster, and another selection."""
    peers: bool = False
    """Also sae-lens, dictionary-learning, eai-sparsify and overcomplete; pip fetches them the first time (gigabytes)."""
    peers_venv: Path | None = None
    """Their virtual environment; None is peers/ in the folder of SAELAB_CACHE."""
    out: Path | None = None
    """Folder for step.csv and step.json; None prints only."""
    bf16: bool = True
    """Screens in bfloat16 where the machine has units for it; --no-bf16 for float32."""
    device: str = field(default_factory=default_device)
    """Where the steps run. Rows from a GPU are also added to kernels/bench/results.csv."""
    floor: dict[int, float] = field(default_factory=dict)
    """Smallest allowed ratio for a d_sae; the exit status says whether it held."""


class SparseTopK:
    """A step of `saelab.train`, without its data and files."""

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
    """Time every size; gives 1 when a floor was not reached."""
    if settings.peers and settings.device != "cpu":
        raise ValueError(
            f"device={settings.device!r} with --peers: the other libraries' steps run on a CPU; add --device cpu."
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
    """How our step's time grows with d_sae: against the smallest size from 8192 on, for each k."""
    ours = [(*map(int, row["shape"].split("x")[2:]), row["median"]) for row in rows if row["provider"] == "saelab"]
    lines = []
    for k in sorted({k for _, k, _ in ours}):
        sizes = sorted((d_sae, ms) for d_sae, other, ms in ours if other == k and d_sae >= 8192)
        for d_sae, ms in sizes[1:]:
            larger, longer = d_sae / sizes[0][0], ms / sizes[0][1]
            verdict = "no faster than linearly" if longer <= larger else "FASTER THAN LINEARLY"
            lines.append(f"k {k}: d_sae {sizes[0][0]} to {d_sae}, {larger:g} times; time {longer:.2f} times: {verdict}")
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
    """Weights and sums are float32; what finds the candidates is said beside."""
    return "float32 (bf16 screen)" if settings.bf16 and fast_bf16(settings.device) else "float32"


def _ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Their time over ours, turn by turn."""
    each = quantiles([b / a for a, b in zip(ours, theirs, strict=True)], scale=1)
    return {"ratio": each["median"], "ratio_q20": each["q20"], "ratio_q80": each["q80"]}


def _check_selection(sae: TopKSAE, x: Tensor, k: int) -> None:
    """The selection of 64 rows against float64; raises `AssertionError` on a difference beyond rounding."""
    with torch.no_grad():
        feature_acts = sae.encode(x)
        centered = (sae.normalize(x[:64]) - sae.b_dec).double()
        want = encode_topk(centered, sae.W_enc.double(), sae.b_enc.double(), k)
        got = feature_acts.select_rows(torch.arange(64, device=x.device)).to_dense()
    assert torch.allclose(got.double(), want, atol=1e-4), "encode_topk is wrong here; nothing is timed"


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
    """Seconds of one step; a GPU is waited for."""
    start = time.perf_counter()
    step(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Settings, description=__doc__)))
