"""The one place where torch pickles are read, as older formats are made of them: tensors and plain values alone, never code."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import SaelabError


def load_pickle(path: Path) -> dict[str, Tensor | str]:
    """The tensors and strings of a torch file by name, those of nested dicts with dotted names ("sae.W_E"); numbers become
    tensors without dimensions.

    Raises `SaelabError` if the file is damaged, or holds objects that only running code could restore.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a protocol that torch does not write itself
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SaelabError(
            f"{path} is a pickle that holds more than tensors, which could run code when loaded; saelab does not read it. "
            f"Save its state dict alone: torch.save(module.state_dict(), path). ({str(error).splitlines()[0]})"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise SaelabError(f"{path} is truncated or damaged ({error}): download it again.") from error
    if not isinstance(found, Mapping):
        raise SaelabError(f"{path} holds a {type(found).__name__}, but a state dict was expected.")
    return dict(_flat(found, ""))


def save_pickle(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict of plain tensors, for formats that want a torch file."""
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _flat(found: Mapping[Any, Any], prefix: str) -> list[tuple[str, Tensor | str]]:
    """Values of other types are left out: no format needs them."""
    flat: list[tuple[str, Tensor | str]] = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            flat.append((f"{prefix}{name}", value.detach()))
        elif isinstance(value, str):
            flat.append((f"{prefix}{name}", value))
        elif isinstance(value, bool | int | float):
            flat.append((f"{prefix}{name}", torch.tensor(value)))
    return flat
