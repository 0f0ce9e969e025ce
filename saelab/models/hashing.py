"""Fingerprints of models and tokenizers, so that an SAE can say what it was trained on."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_KNOWN: dict[bytes, str] = {}
"""Hashes of tokenizers by the content they were taken of."""


def hash_folder(folder: Path) -> str | None:
    """SHA-256 over the tensors of a folder's safetensors, or None when it holds none."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        where = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    elif single.is_file():
        with safe_open(single, framework="pt") as file:
            where = dict.fromkeys(file.keys(), single)
    else:
        return None
    opened: dict[Path, Any] = {path: safe_open(path, framework="pt") for path in set(where.values())}
    return _hash_tensors(list(where), lambda name: opened[where[name]].get_tensor(name))


def hash_model(model: nn.Module) -> str:
    """SHA-256 over the tensors of a module's state."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return _hash_tensors(list(state), lambda name: state[name])


def state_mark(model: nn.Module) -> str:
    """Changes when a module's tensors are replaced or written to in place; far cheaper than `hash_model`.

    A tensor counts by its place in memory, the version that autograd gives it, and 64 of its values (`.data` knows no version).
    """
    digest, values = hashlib.sha256(), []
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.numel():
            version = None if value.is_inference() else value._version
            digest.update(f"{name} {value.data_ptr()} {version} {value.dtype} {tuple(value.shape)}\n".encode())
            values.append(_some_values(value.detach()))
    if values:
        digest.update(torch.cat(values).cpu().numpy().tobytes())
    return digest.hexdigest()


def _some_values(x: Tensor, n: int = 64) -> Tensor:
    """About `n` evenly spaced values as float64, without a copy of the rest."""
    if x.is_contiguous():
        x = x.view(-1)
        return x[:: -(-len(x) // n)].double()
    return x[(0,) * (x.ndim - 1)][:n].double()


def _hash_tensors(names: list[str], tensor: Callable[[str], Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        value = tensor(name).detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_tokenizer_files(tokenizer: Any) -> str:
    """SHA-256 over the files of a tokenizer that only Python runs (merges, model of pieces), which `hash_tokenizer` does not
    see; "" for the others, and for one that has none."""
    if tokenizer is None or getattr(tokenizer, "backend_tokenizer", None) is not None:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = tokenizer.save_vocabulary(folder)
        except (AttributeError, NotImplementedError, OSError):
            return ""
        contents = [Path(file).name.encode() + b"\n" + Path(file).read_bytes() for file in sorted(files or ())]
    return hashlib.sha256(b"\n".join(contents)).hexdigest() if contents else ""


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's content, its state of padding and truncation left out; "" for None."""
    if tokenizer is None:
        return ""
    backend, special = getattr(tokenizer, "backend_tokenizer", None), sorted(map(str, tokenizer.all_special_tokens))
    if backend is None:
        return _hash_content({"vocab": tokenizer.get_vocab()}, special)
    text = backend.to_str()
    key = hashlib.sha256(json.dumps([text, special]).encode()).digest()  # a tenth of the time of reading it
    if key not in _KNOWN:
        _KNOWN[key] = _hash_content(json.loads(text), special)
    return _KNOWN[key]


def _hash_content(content: dict[str, Any], special: list[str]) -> str:
    content |= {"padding": None, "truncation": None, "special": special}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
