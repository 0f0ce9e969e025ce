"""Small RUN folders for tests of whole commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saelab.activation_cache.harvest import harvest

WORDS = [
    "the",
    "river",
    "runs",
    "past",
    "an",
    "old",
    "mill",
    "where",
    "nobody",
    "came",
    "to",
    "see",
    "what",
    "the",
    "light",
    "of",
    "morning",
    "had",
    "made",
    "of",
    "it",
]
HOOK = "blocks.1.hook_resid_post"


def write_texts(path: Path) -> Path:
    """80 documents of 59 words; about a tenth is held out."""
    documents = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 60)) + f" {i}." for i in range(80)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def make_run(folder: Path, lm: Any) -> Path:
    """A RUN with a cache of 4,000 activations of those documents."""
    folder.mkdir()
    texts = write_texts(folder / "texts.jsonl")
    harvest(lm, texts, [HOOK], 4_000, folder / "cache", ctx_len=64, progress=False)
    return folder
