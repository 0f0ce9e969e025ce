"""An SAE of a RUN together with the language models whose activations it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saelab.saes import SAE


def with_model(sae_dir: Path, model: str | Sequence[str] | None = None, dtype: str | None = None) -> tuple[SAE, Any]:
    """The SAE and the model (or models) whose activations it reads, on the same device; `model` is another than the one it was
    trained on, or several, `dtype` the name of a torch dtype. Raises `ValueError` if it records no model and none is given."""
    from saelab.io import load_sae

    sae = load_sae(sae_dir)
    known = sae.provenance.origin.get("models") or {"": sae.provenance.origin.get("model", {})}
    given = [model] if isinstance(model, str) else list(model or ())
    names = given or [one.get("name") for one in known.values()]
    if None in names:
        raise ValueError("This SAE was trained on bare tensors and records no language model; set --model.")
    lms = [load_lm(name, dtype) for name in names]
    return sae.to(lms[0].device), lms if len(lms) > 1 else lms[0]


def load_lm(model: str, dtype: str | None = None) -> Any:
    """A language model in the torch dtype of this name (None: the default)."""
    import torch

    from saelab.models import load_model

    return load_model(model, dtype=getattr(torch, dtype) if dtype else None)
