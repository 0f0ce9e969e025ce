"""Settings of `bench_step`."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch

from saelab.kernels.bench.providers import BASELINES, Baseline, BaselineName, Op
from saelab.kernels.bench.rows import default_device
from saelab.kernels.bench.sizes import CPU_D_SAE, GPU_SIZES, Shape
from saelab.kernels.candidates import MIN_BF16_ROWS
from saelab.kernels.dispatch import fast_bf16


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    d_sae: tuple[int, ...] = ()
    """Dictionary sizes. Without any: 4096 to 131072 on a CPU or with --cache; on a GPU the sizes of GPU_SIZES, and then k, d_in
    and batch_size are ignored."""
    k: tuple[int, ...] = (32,)
    """Features per token; every d_sae is run with every k."""
    d_in: int = 576
    """Width of the activations; ignored with --cache."""
    batch_size: int = 2048
    """Tokens per step."""
    ops: tuple[Op, ...] = ("step",)
    """What to time: the training step; encode_topk and decode without gradients against dense bf16 products."""
    baselines: tuple[BaselineName, ...] | None = None
    """Steps to compare with: dense in fp32, TF32, under bf16 autocast, the same compiled, a dense encoder with our decoder, and
    eai-sparsify where it is installed. None: fp32 on a CPU, all on a GPU."""
    pairs: int = 7
    """Timed steps of each implementation, which alternate."""
    warmup: int | None = None
    """Untimed warm-up steps, so that the dictionary is no longer random. None: 20 on a CPU, 4 on a GPU."""
    cache: Path | None = None
    """Activation cache to read the batches from, for example runs/demo/cache."""
    dense_limit: int | None = None
    """Largest d_sae at which baselines and peers also run (they need three or more (batch, d_sae) tensors). None: 32768 on a
    CPU, no limit on a GPU, where a baseline that runs out of memory is skipped."""
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
    """Smallest allowed ratio per d_sae; the exit status is 1 if the ratio to the fastest baseline is below it."""

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    @property
    def shapes(self) -> list[Shape]:
        if not (self.d_sae or self.on_cpu or self.cache):
            return list(GPU_SIZES)
        sizes = itertools.product(self.k, self.d_sae or CPU_D_SAE)
        return [Shape(self.batch_size, self.d_in, d_sae, k) for k, d_sae in sizes]

    @property
    def warmup_steps(self) -> int:
        return self.warmup if self.warmup is not None else 20 if self.on_cpu else 4

    @property
    def screen(self) -> str:
        """Precision of our product."""
        enough = self.batch_size >= MIN_BF16_ROWS or not self.on_cpu
        return "bf16" if self.bf16 and enough and fast_bf16(self.device) else "fp32"

    def with_dense(self, d_sae: int) -> bool:
        """Whether baselines and peers run at this size."""
        limit = self.dense_limit if self.dense_limit is not None else 32768 if self.on_cpu else sys.maxsize
        return d_sae <= limit

    def baselines_at(self, d_sae: int) -> list[Baseline]:
        names = self.baselines if self.baselines is not None else ("fp32",) if self.on_cpu else get_args(BaselineName)
        return [BASELINES[name] for name in names] if self.with_dense(d_sae) else []
