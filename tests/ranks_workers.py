"""What the processes of tests/test_distributed_*.py do."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_saes import config_of, data

from saelab import TrainConfig, train
from saelab.distributed import SINGLE_PROCESS, init_distributed
from saelab.distributed.mesh import build_mesh
from saelab.errors import TrainingError
from saelab.saes import VARIANTS, StepInfo
from saelab.training.feature_shards import shard_of

D_SAE = 96
SPECIAL: dict[str, dict[str, Any]] = {
    "topk": {"k_aux": 6, "k_start": 6},
    "csr": {"view_dropout": 0.2},
    "mutual_choice": {"k_start": 9},
    "batch_topk": {"aux": "aux_zipf"},
    "relu": {"target_l0": 6.0},
    "gated": {"target_l0": 6.0},
    "jumprelu": {"target_l0": 6.0},
    "gba": {"adapt_every": 2},
}
CONFIGS = {
    name: config_of(name, D_SAE, **SPECIAL.get(name, {}))
    for name, variant in VARIANTS.items()
    if variant.supports_data_parallel
}
# Two parts of 34 and 33 rows, of which the second has no equal shares. Clipping is float32's affair.
TRAIN = TrainConfig(
    n_tokens=67 * 6,
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
    with fp64():
        for name, config in CONFIGS.items():
            own = folder / name / ("here" if rank == 0 else f"never-{rank}")
            sae = train(config, data(name, planted()), TRAIN, own, progress=False)
            save_file(
                {key: x.contiguous() for key, x in sae.state_dict().items()}, folder / f"{name}-{rank}.safetensors"
            )
    try:
        train(config_of("codebook", D_SAE), planted(), TrainConfig(n_tokens=64, batch_size=64), progress=False)
    except ValueError as error:
        (folder / f"refused-{rank}.txt").write_text(str(error))


KILLED = TrainConfig(
    n_tokens=64 * 20, batch_size=64, warmup_steps=3, checkpoint_every=5, log_every=3, clip_relative=1.05
)


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


RESUMED = {"topk": ("1", "4x4"), "batch_topk": ("1", "4x2")}
SHARDED = {"topk": config_of("topk", D_SAE, k_aux=6), "batch_topk": config_of("batch_topk", D_SAE)}


def reference(rank: int, folder: Path) -> None:
    """Unsharded runs in one process: to the end, and to the end from each checkpoint of folder/cut-NAME-*."""
    with fp64():
        for name in SHARDED:
            train_sharded(name, folder / f"whole-{name}", 1)
            train_sharded(name, folder / f"resumed-{name}-1", 1)


def save_sharded(rank: int, folder: Path) -> None:
    """Runs on two shards to the end; and cut short, sharded and data-parallel."""
    with fp64():
        for name in SHARDED:
            train_sharded(name, folder / f"two-{name}", 2)
            for kind, shards in (("sharded", 2), ("replicated", 1)):
                with suppress(TrainingError):  # the data ends, a step after a checkpoint
                    train_sharded(name, folder / f"cut-{name}-{kind}", shards, n_chunks=7)


def resume_at_four(rank: int, folder: Path) -> None:
    """The selection, and what was cut short by two ranks, on a mesh of 2 x 2 and on four shards."""
    for dtype in (torch.float32, torch.float64):
        for shards in (2, 4):
            select_with_ties(dtype, shards)
    share_with_ties()
    with fp64():
        for name in SHARDED:
            for shards in (2, 4):
                train_sharded(name, folder / f"four-{name}-{shards}", shards)
                if f"4x{shards}" in RESUMED[name]:
                    train_sharded(name, folder / f"resumed-{name}-4x{shards}", shards)
        train_sharded("topk", folder / "resumed-replicated", 2)
    refused = []
    for config, shards in (("relu", 4), ("topk", 3), ("mutual_choice", 2)):
        try:
            train(config_of(config, D_SAE), planted(), replace(TRAIN, feature_shards=shards), progress=False)
        except ValueError as error:
            refused.append(str(error))
    (folder / f"refused-{rank}.json").write_text(json.dumps(refused))


def train_sharded(name: str, folder: Path, shards: int, n_chunks: int = 8) -> None:
    """Eight steps, or as many as there are chunks."""
    chunks = (planted(TRAIN.batch_size, seed=step) for step in range(n_chunks))
    changes: dict[str, Any] = {
        "n_tokens": 8 * TRAIN.batch_size,
        "feature_shards": shards,
        "checkpoint_every": 3,
        "snapshot_every": 4,
        "grad_accumulation": 1,
        "dead_after_tokens": 70,
        "clip_relative": 1e6,  # its state is kept; that it clips is float32's affair
    }
    train(SHARDED[name], chunks, replace(TRAIN, **changes), folder, progress=False)


def select_with_ties(dtype: torch.dtype, shards: int) -> None:
    """Small whole numbers: nearly every selection ends in a tie. Compared with the unsharded SAE bit for bit."""
    mesh = build_mesh(init_distributed(), shards, "cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (131, 8), generator=generator).to(dtype)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    for name, config in SHARDED.items():
        sae: Any = VARIANTS[name](replace(config, normalize="none"), 8).to(dtype)
        with torch.no_grad():
            sae.W_enc.copy_(torch.randint(-1, 2, sae.W_enc.shape, generator=generator))
        shard: Any = shard_of(sae, mesh).to(dtype)
        whole = sae.select(x, StepInfo(dead, 0, 10, SINGLE_PROCESS.sharing(len(x)))).to_dense()
        ranks = mesh.data.sharing(len(x))
        own = shard.select(x[ranks.local_rows], StepInfo(dead[: shard.d_sae], 0, 10, ranks)).to_dense()
        expected = whole[ranks.local_rows, shard.first_feature : shard.first_feature + shard.d_sae]
        assert torch.equal(own, expected) and bool(whole.any()), f"{name}, {shards} shards"
        assert name == "topk" or torch.equal(shard.threshold, sae.threshold)


def share_with_ties() -> None:
    """The same for rows shared by all ranks."""
    ranks, generator = init_distributed().sharing(131), torch.Generator().manual_seed(1)
    x = torch.randint(-2, 3, (131, 8), generator=generator).float()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    for name in ("batch_topk", "mutual_choice", "feature_choice"):
        for step in (0, 2, 7):  # Mutual Choice first, then on the way, then Feature Choice
            config = config_of(name, D_SAE, normalize="none")
            saes: list[Any] = [VARIANTS[name](config, 8) for _ in range(2)]
            one, shared = saes
            integers = torch.randint(-1, 2, one.W_enc.shape, generator=generator).float()
            for sae in saes:
                sae.W_enc.data.copy_(integers)
            whole = one.select(x, StepInfo(dead, step, 10)).to_dense()
            own = shared.select(x[ranks.local_rows], StepInfo(dead, step, 10, ranks)).to_dense()
            assert torch.equal(own, whole[ranks.local_rows]) and bool(whole.any()), f"{name} at step {step}"
            assert torch.equal(one.threshold, shared.threshold)


@contextmanager
def fp64() -> Iterator[None]:
    """SAEs are made in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def lines(folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in found]
