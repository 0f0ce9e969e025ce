"""What the manifest of a finished harvest records: counts, files and statistics. Independent of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from saelab.activation_cache import layout
from saelab.activation_cache.codec import Storage
from saelab.activation_cache.columns import columns_of
from saelab.files import atomic_save_safetensors
from saelab.tokens import TokenBatch


@dataclass
class Totals:
    """Counts of what was read, over the contexts in order."""

    n_contexts: int = 0
    n_tokens: int = 0
    n_documents: int = 0
    padding: int = 0

    def add(self, batch: TokenBatch) -> None:
        """Count the next batch."""
        padding = int((batch.doc < 0).sum())
        self.n_contexts += len(batch.ids)
        self.n_tokens += batch.ids.numel() - padding
        self.n_documents = max(self.n_documents, int(batch.doc.max()) + 1)
        self.padding += padding


def contents(
    folder: Path,
    config: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    totals: Totals,
    counts: Mapping[str, int],
    storage: Storage,
    document_ids: Int[Tensor, " n_documents"],
    medians: Mapping[str, float],
) -> dict[str, Any]:
    """Manifest entries for what the journals (`entries`) say is on disk; writes the documents and the statistics.

    `counts` are the masked tokens by reason, `medians` the norm rule's medians by hook.
    """
    atomic_save_safetensors(folder / layout.DOCUMENTS, {"ids": document_ids})
    shards = [{k: e[k] for k in ("folder", "rows", "files")} for e in entries if e["kind"] == "shard"]
    tokens = [{k: e[k] for k in ("file", "sequences", "bytes", "sha256")} for e in entries if e["kind"] == "tokens"]
    stats = {column: save_stats(folder, column, shards, medians.get(column)) for column in columns_of(config)}
    return {
        "n_rows": sum(shard["rows"] for shard in shards),
        "n_sequences": totals.n_contexts,
        "n_tokens": totals.n_tokens,
        "n_documents": len(document_ids),
        "masked": dict(counts),
        "padding": totals.padding,
        "shards": shards,
        "tokens": tokens,
        "stats": stats,
        **_storage_entry(folder, columns_of(config), storage, shards),
        "documents": layout.describe_file(folder / layout.DOCUMENTS),
    }


def save_stats(folder: Path, hook: str, shards: Sequence[Mapping[str, Any]], median: float | None) -> dict[str, Any]:
    """Write the statistics of a hook from the sums in its shards; returns the file's size and SHA-256. Gradients have no
    median norm."""
    n = sum(shard["rows"] for shard in shards)
    totals = _totals(folder, hook, shards, "sum", "sum_squares", "sum_norms")
    tensors = {
        "n": torch.tensor(n),
        "mean": totals["sum"] / n,
        "second_moment": totals["sum_squares"] / n,
        "mean_norm": totals["sum_norms"] / n,
    }
    if median is not None:
        tensors["median_norm"] = torch.tensor(median, dtype=torch.float64)
    path = folder / layout.stats_file(hook)
    atomic_save_safetensors(path, tensors)
    return layout.describe_file(path)


def _storage_entry(
    folder: Path, hooks: Mapping[str, int], storage: Storage, shards: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Manifest entry of a storage other than bfloat16: outlier columns (int8) and quantisation error of each hook."""
    if storage.name == "bfloat16":
        return {}
    error = {hook: _relative_error(folder, hook, shards) for hook in hooks if storage.kind(hook) != "bfloat16"}
    outliers = {hook: list(dims) for hook, dims in storage.outliers.items()}
    return {"storage": {"error": error, "outliers": outliers}}


def _totals(folder: Path, hook: str, shards: Sequence[Mapping[str, Any]], *names: str) -> dict[str, Tensor]:
    """Sums of a hook over all shards."""
    totals: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(folder / shard["folder"] / f"{hook}.safetensors", "pt") as file:
            for name in names:
                totals[name] = totals.get(name, 0) + file.get_tensor(name)
    return totals


def _relative_error(folder: Path, hook: str, shards: Sequence[Mapping[str, Any]]) -> float:
    """sum |x - x~|^2 / sum |x~ - mean|^2 over the harvest, x~ being the stored row; 0 if the rows do not vary."""
    totals = _totals(folder, hook, shards, "sum", "sum_squares", "sum_error")
    n = sum(shard["rows"] for shard in shards)
    variance = (totals["sum_squares"] - totals["sum"].square() / n).sum().item()
    return totals["sum_error"].item() / variance if variance > 0 else 0.0
