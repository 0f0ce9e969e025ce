"""The harvest and the trainings that `run.py` kills: `worker.py MODEL FOLDER KIND ...` does them, and prints the seconds of each.

MODEL is the folder of a tiny model, or smollm2.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from saelab import TrainConfig, harvest, load_model, saes, train
from saelab.activation_cache.streaming import stream
from saelab.training.finetune import train_end_to_end

SENTENCE = "the river runs past an old mill where nobody came to see what the light of morning had made of it"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 90)) + f" {i}." for i in range(400)]
HOOK = "blocks.1.hook_resid_post"


def run_harvest(lm: Any, folder: Path) -> None:
    large = lm.name == "smollm2"
    sizes: dict[str, Any] = {"n_tokens": 8_000, "ctx_len": 128} if large else {"n_tokens": 50_000, "ctx_len": 64}
    sizes |= {"shard_rows": 500, "pool_shards": 3} if large else {"shard_rows": 2_000, "pool_shards": 4}
    texts: Any = "demo" if large else TEXTS
    harvest(lm, texts, HOOK, out_dir=folder / "cache", batch_size=8, progress=False, **sizes)


def run_train(lm: Any, folder: Path) -> None:
    _train(lm.name == "smollm2", folder / "cache", folder / "sae")


def run_stream(lm: Any, folder: Path) -> None:
    large = lm.name == "smollm2"
    sizes: dict[str, Any] = {"ctx_len": 64, "batch_size": 8, "shard_rows": 250, "pool_shards": 8}
    _train(large, stream(lm, "demo" if large else TEXTS, HOOK, **sizes), folder / "streamed")


def run_finetune(lm: Any, folder: Path) -> None:
    large = lm.name == "smollm2"
    texts: Any = "demo" if large else TEXTS
    config = TrainConfig(n_tokens=128 * (10 if large else 60), batch_size=128, checkpoint_every=7, log_every=5)
    data = stream(lm, texts, HOOK, ctx_len=64)
    train_end_to_end(saes.BatchTopKConfig(96, 8), data, lm, config, folder / "finetuned", texts=texts, progress=False)


def _train(large: bool, data: Any, folder: Path) -> None:
    sae = saes.BatchTopKConfig(d_sae=512 if large else 96, k=8)  # its threshold is part of the state
    config = TrainConfig(n_tokens=128 * (120 if large else 300), batch_size=128, checkpoint_every=7, log_every=5)
    train(sae, data, config, out_dir=folder, progress=False)


WORK = {"harvest": run_harvest, "train": run_train, "stream": run_stream, "finetune": run_finetune}

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, folder, *kinds = sys.argv[1:]
    lm = load_model(model)
    for kind in kinds:
        begun = time.perf_counter()
        WORK[kind](lm, Path(folder))
        print(time.perf_counter() - begun)
