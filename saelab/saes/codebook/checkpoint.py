"""A model's codebooks on disk: `codebooks.json`, `codebooks.safetensors`, and, if the model's weights were trained with
them, `model.safetensors`. `codebooks.json` is written last, so a folder that has it is complete."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saelab.errors import SaelabError
from saelab.files import atomic_save_safetensors, atomic_write_json, claim_folder, read_json, tensors_hash
from saelab.saes.codebook.config import CodebookConfig
from saelab.saes.codebook.insertion import Inserted, insert

if TYPE_CHECKING:
    from saelab.models.language_model import LanguageModel

FORMAT_VERSION = 1


def save(inserted: Inserted, folder: str | Path) -> Path:
    """Write codebooks, and the model's weights if they were trained. Only the hash of the base model is saved."""
    folder = claim_folder(folder, "codebooks.json", "codebooks")
    trained = inserted.base_hash is not None
    files = {"codebooks.safetensors": _codebook_state(inserted)} | (
        {"model.safetensors": _weights(inserted.lm)} if trained else {}
    )
    for name, tensors in files.items():
        atomic_save_safetensors(folder / name, tensors)
    configs = {name: dataclasses.asdict(book.config) for name, book in inserted.codebooks.items()}
    meta = {"format_version": FORMAT_VERSION, "model": inserted.lm.name, "configs": configs}
    meta |= {"base_hash": inserted.base_hash or inserted.lm.hash, "model_hash": inserted.lm.hash}
    meta |= {"files": {name: tensors_hash(tensors) for name, tensors in files.items()}}
    atomic_write_json(folder / "codebooks.json", meta)
    return folder


def load(lm: LanguageModel, folder: str | Path) -> Inserted:
    """Insert saved codebooks into the model they were trained in, and load the model weights trained with them.

    Raises `SaelabError` if the model is a different one, or a file is missing or altered; the model is then unchanged.
    """
    folder = Path(folder)
    meta = read_json(folder / "codebooks.json")
    try:
        version, base_hash, hashes = meta["format_version"], meta["base_hash"], meta["files"]
        configs = {name: CodebookConfig(**config) for name, config in meta["configs"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SaelabError(f"{folder / 'codebooks.json'} was altered ({error!r}): restore it from a backup.") from error
    if version > FORMAT_VERSION:
        raise SaelabError(
            f"{folder} has format version {version}; this saelab reads up to {FORMAT_VERSION}: update saelab."
        )
    if lm.hash != base_hash:
        raise SaelabError(
            f"{folder} belongs to the model {meta.get('model')!r} with hash {str(base_hash)[:12]}; {lm.name} has "
            f"{lm.hash[:12]}: load that model as it was before codebooks were inserted."
        )
    files = {name: _read(folder / name, expected) for name, expected in hashes.items()}
    inserted = insert(lm, configs, list(configs))
    try:
        _fill(_codebook_state(inserted), files["codebooks.safetensors"], folder / "codebooks.safetensors")
        if "model.safetensors" in files:
            _fill(_weights(lm), files["model.safetensors"], folder / "model.safetensors")
            inserted.base_hash = base_hash
            lm.weights_changed()
    except SaelabError:
        inserted.remove()
        raise
    return inserted


def _codebook_state(inserted: Inserted) -> dict[str, Tensor]:
    books = inserted.codebooks.items()
    return {f"{hook}/{name}": tensor for hook, book in books for name, tensor in book.state_dict().items()}


def _weights(lm: LanguageModel) -> dict[str, Tensor]:
    """The model's parameters, tied ones once."""
    return {name: parameter.detach() for name, parameter in lm.model.named_parameters()}


def _read(path: Path, expected: str) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SaelabError(f"{path} is missing, truncated or altered ({error}).") from error
    if tensors_hash(tensors) != expected:
        raise SaelabError(f"{path} was altered: its hash is not the one in codebooks.json. Restore it from a backup.")
    return tensors


@torch.no_grad()
def _fill(targets: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    """Copy in place, all or nothing."""
    shapes: list[Any] = [{name: tensor.shape for name, tensor in each.items()} for each in (targets, tensors)]
    if shapes[0] != shapes[1]:
        raise SaelabError(f"{path} does not fit the model and the configs in codebooks.json.")
    for name, tensor in targets.items():
        tensor.copy_(tensors[name])
