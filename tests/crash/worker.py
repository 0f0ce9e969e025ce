"""One harvest or one training in a process of its own, to be killed: `worker.py harvest|train MODEL FOLDER`.

Prints "ready" when the work begins. MODEL is the folder of a tiny model, or smollm2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import saelab

SENTENCE = "the river runs past an old mill where nobody came to see what the light of morning had made of it"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 90)) + f" {i}." for i in range(400)]
HOOK = "blocks.1.hook_resid_post"


def harvest(model: str, folder: Path) -> None:
    lm = saelab.load_model(model)
    large = model == "smollm2"
    sizes: dict[str, Any] = {"n_tokens": 8_000, "ctx_len": 128} if large else {"n_tokens": 100_000, "ctx_len": 64}
    sizes |= {"shard_rows": 500, "pool_shards": 3} if large else {"shard_rows": 3_000, "pool_shards": 4}
    print("ready", flush=True)
    saelab.harvest(
        lm, "demo" if large else TEXTS, HOOK, out_dir=folder / "cache", batch_size=8, progress=False, **sizes
    )


def train(model: str, folder: Path) -> None:
    large = model == "smollm2"
    sae = saelab.saes.BatchTopKConfig(d_sae=512 if large else 96, k=8)  # its threshold is part of the state
    config = saelab.TrainConfig(n_tokens=128 * (120 if large else 600), batch_size=128, checkpoint_every=7, log_every=5)
    print("ready", flush=True)
    saelab.train(sae, folder / "cache", config, out_dir=folder / "sae", progress=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, model, folder = sys.argv[1:]
    {"harvest": harvest, "train": train}[kind](model, Path(folder))
