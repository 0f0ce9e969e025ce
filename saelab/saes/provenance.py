"""Where an SAE comes from: everything about it that is not a weight and does not affect its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def _no_documents() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Provenance:
    """The data and training run behind an SAE; empty for an SAE that was created in memory.

    Never changed in place: use `dataclasses.replace`.
    """

    origin: Mapping[str, Any] = field(default_factory=dict)
    """Model, hook, texts, mask and data fingerprint, as `sae.json` lists them at its top level."""
    trained: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained: config, tokens, last metrics, environment (`training` in `sae.json`)."""
    train_documents: Int[Tensor, " n_documents"] = field(default_factory=_no_documents)
    """Ids of the documents it was trained on (`saelab.tokens.document_id`), int64."""
    folder: Path | None = None
    """The folder it is saved in; None if it is in memory only."""
