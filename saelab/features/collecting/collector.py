"""`Collector`: all that one pass gathers about the features of an SAE. It can be saved, continued, and merged with that of other
contexts, on this process or another, to the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.features.collecting.near_misses import Margins, NearMisses, is_looked_at
from saelab.features.collecting.signed import SignedAccumulator
from saelab.features.collecting.token_sample import TokenSample
from saelab.files import atomic_save_safetensors
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import SAE


class Collector:
    """Statistics, examples, near misses and the token sample of `d_sae` features, from the contexts seen so far."""

    def __init__(self, d_sae: int, ctx_len: int, top_k: int) -> None:
        self.d_sae, self.ctx_len, self.top_k = d_sae, ctx_len, top_k
        self.ends = SignedAccumulator(d_sae, ctx_len, top_k)
        self.near_misses = NearMisses(d_sae, ctx_len)
        self.sample = TokenSample()
        self.n_tokens = 0

    def update(self, sae: SAE, x: Tensor, tokens: Int[Tensor, " batch"], docs: Int[Tensor, " batch"]) -> None:
        """Add the kept rows `x` of whole contexts, which `tokens` (ascending) and `docs` number."""
        self.add(sae, x, _on_cpu(sae.encode(x)), tokens, docs)

    def add(
        self, sae: SAE, x: Tensor, feature_acts: SparseActs, tokens: Int[Tensor, " batch"], docs: Int[Tensor, " batch"]
    ) -> None:
        """As `update`, of rows that are encoded already."""
        entries = self.ends.update(feature_acts, tokens, docs)
        self.sample.update(feature_acts, tokens)
        here = is_looked_at(tokens)
        rows = feature_acts.select_rows(here)
        self.near_misses.update(Margins(sae, x[here.to(x.device)], rows), rows, tokens[here], docs[here], entries)
        self.n_tokens += len(tokens)

    def merge(self, other: Collector) -> None:
        """Add what another collector gathered of other contexts."""
        self.ends.merge(other.ends)
        self.near_misses.merge(other.near_misses)
        self.sample.merge(other.sample)
        self.n_tokens += other.n_tokens

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors for a file."""
        named = {f"ends.{name}": one for name, one in self.ends.tensors().items()}
        named |= {f"near_misses.{name}": one for name, one in self.near_misses.tensors().items()}
        named |= {f"sample.{name}": one for name, one in self.sample.tensors().items()}
        return named | {"n_tokens": torch.tensor(self.n_tokens)}

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the state to a file, atomically."""
        atomic_save_safetensors(path, self.tensors(), metadata)

    def load(self, path: Path) -> dict[str, str]:
        """Continue from the state in a file; returns its metadata."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        for name in ("ends", "near_misses", "sample"):
            stored = {key.partition(".")[2]: one for key, one in tensors.items() if key.startswith(f"{name}.")}
            getattr(self, name).load(stored)
        self.n_tokens = int(tensors["n_tokens"])
        return metadata


def _on_cpu(feature_acts: SparseActs) -> SparseActs:
    values = feature_acts.values.detach().cpu()
    return SparseActs(values, feature_acts.features.cpu(), feature_acts.offsets.cpu(), feature_acts.d_sae)
