"""Loads and saves SAEs: saelab's own format for now; each foreign format will get its own file here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from saelab import io
from saelab.io import load_sae
from saelab.saes.base import check_is_sae

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from saelab.saes import SAE

__all__ = ["load_sae", "save_sae"]
_WRITERS = {"saelab": io.save_sae}


def save_sae(
    sae: SAE,
    folder: str | Path,
    *,
    format: str = "saelab",
    golden_inputs: Float[Tensor, "n *sources d_in"] | None = None,
) -> Path:
    """Save an SAE to `folder`, which `load_sae` and every command read; returns the folder.

    `golden_inputs` are raw activations (at least one row, in the units the SAE was trained on): 64 of them are stored with
    their feature activations, which loading checks. By default they are random inputs around the SAE's centre.
    Raises `ValueError` for an unknown format.
    """
    check_is_sae(sae, "save_sae")
    if format not in _WRITERS:
        raise ValueError(f"format={format!r} is unknown; saelab writes {', '.join(map(repr, _WRITERS))}.")
    return _WRITERS[format](sae, folder, golden_inputs=golden_inputs)
