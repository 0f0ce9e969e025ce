"""What the processes of tests/test_distributed_*.py do."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_saes import config_of

from saelab import TrainConfig, train
from saelab.errors import TrainingError
from saelab.saes import VARIANTS

D_SAE = 96
SPECIAL: dict[str, dict[str, Any]] = {
    "topk": {"k_aux": 6},
    "batch_topk": {"aux": "aux_zipf"},
    "relu": {"target_l0": 6.0},
    "gated": {"target_l0": 6.0},
    "jumprelu": {"target_l0": 6.0},
}
CONFIGS = {name: config_of(name, D_SAE, **SPECIAL.get(name, {})) for name in VARIANTS if name != "codebook"}
# Two parts of 34 and 33 rows, of which the second has no equal shares. Clipping is float32's affair.
TRAIN = TrainConfig(
    n_tokens=67 * 8,
    batch_size=67,
    warmup_steps=3,
    clip_norm=float("inf"),
    dead_after_tokens=150,
    log_every=1,
    grad_accumulation=2,
)


def planted(n: int = 1000, d_in: int = 16, seed: int = 0) -> torch.Tensor:
    """Sparse sums of 32 planted directions."""
    directions = torch.randn(32, d_in, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, 32, generator=generator) * (torch.rand(n, 32, generator=generator) < 0.1)
    return codes @ directions + 1.5


def train_each(rank: int, folder: Path) -> None:
    """Every config in fp64; the weights of each rank. What cannot be shared says so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for name, config in CONFIGS.items():
            own = folder / name / ("here" if rank == 0 else f"never-{rank}")
            sae = train(config, planted(), TRAIN, own, progress=False)
            save_file(
                {key: x.contiguous() for key, x in sae.state_dict().items()}, folder / f"{name}-{rank}.safetensors"
            )
    finally:
        torch.set_default_dtype(before)
    try:
        train(config_of("codebook", D_SAE), planted(), TrainConfig(n_tokens=64, batch_size=64), progress=False)
    except ValueError as error:
        (folder / f"refused-{rank}.txt").write_text(str(error))


KILLED = TrainConfig(n_tokens=64 * 20, batch_size=64, warmup_steps=3, checkpoint_every=5, log_every=3)


def train_whole_and_cut(rank: int, folder: Path, kill_before: int | None) -> None:
    """A run in folder/cut, in which rank 1 kills itself before a step; without that, one in folder/whole as well."""
    config = config_of("batch_topk", D_SAE)
    try:
        train(config, _chunks(rank, kill_before), KILLED, folder / "cut", progress=False)
    except TrainingError as error:
        (folder / "said.txt").write_text(str(error))
        return
    train(config, _chunks(rank, None), KILLED, folder / "whole", progress=False)


def _chunks(rank: int, kill_before: int | None) -> Iterator[torch.Tensor]:
    for step in range(KILLED.n_steps):
        if rank == 1 and step == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        yield planted(64, seed=step)


def lines(folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in found]
