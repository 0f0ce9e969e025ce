"""Cache read throughput, and how much reading slows training: `python -m saelab.activation_cache.bench.read RUN/cache`.

Reading: one epoch of shuffled batches, in the stored dtype, against a bare sequential read of the same files into one
buffer. Training: steps on batches from the cache against steps on batches in memory. The two alternate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from saelab.activation_cache.bench.harvest import median_and_quantiles
from saelab.activation_cache.reader import ActivationCache
from saelab.kernels.allocator import keep_freed_memory
from saelab.kernels.bench.rows import hardware
from saelab.kernels.bench.sparse_step import SparseTopK

_BUFFER_BYTES = 1 << 24


@dataclass(frozen=True)
class Settings:
    """What to time."""

    cache: tyro.conf.Positional[Path]
    """Folder of a finished activation cache, e.g. runs/demo/cache."""
    hook_name: str | None = None
    """Hook to read, if the cache holds several."""
    batch_size: int = 2048
    """Rows per batch."""
    pairs: int = 7
    """Timed runs of each of the two."""
    d_sae: int = 4096
    """Width of the TopK SAE whose steps are timed; 0 times reading only."""
    k: int = 32
    """Active features per token."""
    steps: int = 16
    """Training steps per timed run."""


def main(settings: Settings) -> dict[str, float]:
    """Print a line for reading and one for training; returns the median ratios by name."""
    keep_freed_memory()
    cache = ActivationCache(settings.cache)
    print(f"# {hardware()}; {cache!r}, {settings.pairs} pairs")
    print("op,unit,ours,bare,ratio,ratio_q20,ratio_q80,asked")
    found = {"read": _reading(cache, settings)}
    if settings.d_sae:
        found["train"] = _training(cache, settings)
    return found


def _reading(cache: ActivationCache, settings: Settings) -> float:
    """Reader throughput divided by that of a bare read."""
    hook = settings.hook_name or cache.hook_names[0]
    names = [f"{shard['folder']}/{hook}.safetensors" for shard in cache.manifest["shards"]]
    files, n_batches = [cache.path / name for name in names], cache.n_rows // settings.batch_size
    gigabytes = sum(file.stat().st_size for file in files) / 1e9
    batches = cache.batches(settings.batch_size, hook_name=hook, dtype=torch.bfloat16)
    seconds_of(batches, n_batches)  # warm-up: files are in the page cache, SHA-256 checked
    times = [(seconds_of(batches, n_batches), seconds_bare(files)) for _ in range(settings.pairs)]
    return _report("read", "GB/s", [(gigabytes / ours, gigabytes / bare) for ours, bare in times], "at least 0.8")


def seconds_of(batches: Iterator[Tensor], n: int) -> float:
    """Seconds for the next `n` batches."""
    start = time.perf_counter()
    for _ in range(n):
        next(batches)
    return time.perf_counter() - start


def seconds_bare(files: list[Path]) -> float:
    """Seconds to read all files sequentially into one buffer."""
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def _training(cache: ActivationCache, settings: Settings) -> float:
    """Training steps per second from the cache divided by those from tensors in memory."""
    stats = cache.stats(settings.hook_name)
    model = SparseTopK(cache.d_in(settings.hook_name), settings.d_sae, settings.k)
    model.sae.set_normalization(stats["mean"].float(), float(stats["second_moment"].sum()))
    streams = [cache.batches(settings.batch_size, hook_name=settings.hook_name) for _ in range(2)]
    _steps(model, (next(streams[0]) for _ in range(settings.steps)))
    speeds = []
    for _ in range(settings.pairs):
        in_memory = [next(streams[1]) for _ in range(settings.steps)]
        bare = _steps(model, iter(in_memory))
        del in_memory
        speeds.append((settings.steps / _steps(model, _first(streams[0], settings.steps)), settings.steps / bare))
    return _report("train", "steps/s", speeds, "at least 0.95")


def _first(batches: Iterator[Tensor], n: int) -> Iterator[Tensor]:
    return (next(batches) for _ in range(n))


def _steps(model: SparseTopK, batches: Iterator[Tensor]) -> float:
    start = time.perf_counter()
    for x in batches:
        model.step(x)
    return time.perf_counter() - start


def _report(op: str, unit: str, speeds: list[tuple[float, float]], asked: str) -> float:
    ours, bare = (median_and_quantiles(list(each))[0] for each in zip(*speeds, strict=True))
    median, low, high = median_and_quantiles([a / b for a, b in speeds])
    print(f"{op},{unit},{ours:.2f},{bare:.2f},{median:.3f},{low:.3f},{high:.3f},{asked}")
    return median


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
