"""Fingerprints of models and tokenizers, so that an SAE can say what it was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


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


def _hash_tensors(names: list[str], tensor: Callable[[str], Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        value = tensor(name).detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's content, its state of padding and truncation left out; "" for None."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    content |= {"padding": None, "truncation": None}
    content["special"] = sorted(map(str, tokenizer.all_special_tokens))
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
