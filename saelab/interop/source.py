"""`Source`: the files of one SAE, in a local folder or on the Hugging Face hub (`hub.py`), fetched when a format reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saelab.errors import SaelabError
from saelab.interop.pickles import load_pickle

TENSOR_FILES = (".safetensors", ".pt", ".pth", ".npz")
_DEPTH = 3


class Source:
    """A folder with the files of an SAE, or one file in it (`only`)."""

    def __init__(self, label: str, names: Iterator[str] | list[str], only: str | None = None) -> None:
        self.label = label
        """Path or hub id, with all folder names: some formats keep the layer, the width or k there."""
        self.names = tuple(sorted(names))
        """Files below the folder, as relative paths."""
        self.only = only
        self._read: dict[str, dict[str, Tensor | str]] = {}

    def fetch(self, name: str) -> Path:
        """The local path of a file, downloaded if it has to be."""
        raise NotImplementedError

    def above(self, name: str) -> Path | None:
        """The local path of a file in the parent folder, which may hold the config of a whole run; None if there is none."""
        raise NotImplementedError

    @property
    def record(self) -> dict[str, Any]:
        """Where the files come from, as `sae.json` records it."""
        return {"source": self.label}

    @property
    def files_read(self) -> list[str]:
        """The weight files that were read."""
        return sorted(self._read)

    @cached_property
    def tensor_files(self) -> tuple[str, ...]:
        """The files that may hold weights; the one file if the source is a file."""
        return (self.only,) if self.only else tuple(name for name in self.names if name.endswith(TENSOR_FILES))

    def one_of(self, pattern: re.Pattern[str]) -> str:
        """The one weight file that matches. Raises `SaelabError` if there are several, as in a folder of all layers."""
        found = [name for name in self.tensor_files if pattern.search(name)]
        if len(found) > 1:
            raise SaelabError(
                f"{self.label} holds {len(found)} SAEs: name one of these files ({', '.join(found[:3])}, ...)."
            )
        return found[0]

    def has(self, *names: str) -> bool:
        """Whether all these files are there."""
        return all(name in self.names for name in names)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file that holds an object. Raises `SaelabError` if it does not."""
        return read_object(self.fetch(name))

    def yaml(self, name: str) -> dict[str, Any]:
        """A YAML file that holds a mapping. Raises `SaelabError` if it does not."""
        import yaml

        path = self.fetch(name)
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SaelabError(f"{self.label}: {name} is not YAML ({error}).") from error
        return _mapping(found, f"{self.label}: {name}")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors, npz or torch file on the CPU, in the dtype of the file; read once.

        Raises `SaelabError` for a damaged file, and for a pickle that holds anything but tensors and plain values.
        """
        return {key: value for key, value in self._values(name).items() if isinstance(value, Tensor)}

    def words(self, name: str) -> dict[str, str]:
        """The strings that a torch file holds beside its tensors."""
        return {key: value for key, value in self._values(name).items() if isinstance(value, str)}

    def _values(self, name: str) -> dict[str, Tensor | str]:
        if name not in self._read:
            self._read[name] = _read(self.fetch(name))
        return self._read[name]


class LocalSource(Source):
    """A folder or file on disk."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path).resolve()
        self.folder = path if path.is_dir() else path.parent
        only = None if path.is_dir() else path.name
        super().__init__(path.as_posix(), _files_below(self.folder), only)

    def fetch(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise SaelabError(f"{self.label} has no {name}.")
        return path

    def above(self, name: str) -> Path | None:
        path = self.folder.parent / name
        return path if path.is_file() else None


def _files_below(folder: Path) -> Iterator[str]:
    pending = [(folder, 1)]
    while pending:
        here, depth = pending.pop()
        for entry in here.iterdir():
            if entry.is_file():
                yield entry.relative_to(folder).as_posix()
            elif entry.is_dir() and depth < _DEPTH and not entry.name.startswith("."):
                pending.append((entry, depth + 1))


def check_present(tensors: Mapping[str, Tensor], names: Sequence[str], where: str) -> None:
    """Raise `SaelabError` naming the tensors that are missing."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise SaelabError(f"{where} has no {' and no '.join(missing)}: download it again.")
    for name in names:
        tensor = tensors[name]
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype}, {tensor.layout}".replace("torch.", "")
            raise SaelabError(f"{where} holds {name} as {kind}, but weights are dense tensors of floats.")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises `SaelabError` if it does not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SaelabError(f"{path} is not JSON ({error}): download it again.") from error
    return _mapping(found, str(path))


def _mapping(found: Any, name: str) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise SaelabError(f"{name} holds a {type(found).__name__}, but a mapping was expected.")
    return dict(found)


def _read(path: Path) -> dict[str, Tensor | str]:
    if path.suffix in (".pt", ".pth"):
        return load_pickle(path)
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays}
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, EOFError, KeyError) as error:
        raise SaelabError(f"{path} is truncated or damaged ({error}): download it again.") from error
