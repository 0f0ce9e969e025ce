"""Fingerprints of models and tokenizers, so that an SAE can record what it was trained on."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_NO_NUMBERS = {
    *("_name_or_path", "name_or_path", "model_name", "transformers_version", "torch_dtype", "dtype", "device"),
    *("architectures", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id"),
    *("quantization_config", "auto_map", "tokenizer_name", "original_architecture", "seed", "n_devices"),
}
"""Config keys that do not affect what the model computes, or (`quantization_config`) whose effect is in the weights."""
_KNOWN: dict[bytes, str] = {}
"""Tokenizer hashes by a digest of the content they were computed from."""


def hash_folder(folder: Path) -> str | None:
    """SHA-256 over the tensors of a folder's safetensors, or None if it holds none."""
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
    state = dict(_tensors(model))
    return _hash_tensors(list(state), lambda name: state[name])


def checksum(model: nn.Module) -> str:
    """Changes if any number in a module's tensors does; reads each once, at a tenth of the cost of `hash_model`."""
    digest, sums = hashlib.sha256(), []
    for name, value in _tensors(model):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if not value.numel():
            continue
        flat = value.detach().contiguous().view(-1)
        words = flat.view(_WORDS[value.element_size()]) if value.element_size() in _WORDS else flat.view(torch.uint8)
        width = max(1, int(len(words) ** 0.5))  # row and column sums: swapped numbers change one of them
        grid, rest = words[: len(words) // width * width].view(-1, width), words[len(words) // width * width :]
        sums += [part.cpu() for part in (grid.sum(0, dtype=torch.int64), grid.sum(1, dtype=torch.int64), rest.long())]
    digest.update(torch.cat(sums).numpy().tobytes() if sums else b"")
    return digest.hexdigest()


def state_mark(model: nn.Module) -> str:
    """Changes if a module's tensors are replaced or written to (except through `.data`); reads no values."""
    marks = [
        f"{name} {value.data_ptr()} {None if value.is_inference() else value._version} {tuple(value.shape)}"
        for name, value in _tensors(model)
    ]
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()


def stored_weights(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of the weight files in a folder, to detect later writes."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module's state by name, including those that quantised layers pack in tuples."""
    for name, value in model.state_dict().items():
        parts = value if isinstance(value, tuple | list) else [value]
        for i, part in enumerate(parts):
            if isinstance(part, Tensor):
                yield name if part is value else f"{name}.{i}", part.dequantize() if part.is_quantized else part


def hash_config(model: Any) -> str:
    """SHA-256 of the values in a model's config that differ from its class's defaults, without names, versions and dtypes."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_diff_dict"):
        values = config.to_diff_dict()
    else:
        known = getattr(model, "cfg", config)
        values = {} if known is None else {key: value for key, value in vars(known).items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(_deciding(values), sort_keys=True, default=str).encode()).hexdigest()


def _deciding(values: Any) -> Any:
    if isinstance(values, dict):
        return {str(key): _deciding(value) for key, value in values.items() if key not in _NO_NUMBERS}
    return [_deciding(value) for value in values] if isinstance(values, list | tuple) else values


def _hash_tensors(names: list[str], tensor: Callable[[str], Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        value = tensor(name).detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_tokenizer_files(tokenizer: Any) -> str:
    """SHA-256 over the files of a slow (pure Python) tokenizer (merges, SentencePiece model), which `hash_tokenizer` does not
    cover; "" for a fast one, and for one without files."""
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
    """SHA-256 over a tokenizer's content, without its padding and truncation state; "" for None."""
    if tokenizer is None:
        return ""
    backend, special = getattr(tokenizer, "backend_tokenizer", None), sorted(map(str, tokenizer.all_special_tokens))
    if backend is None:
        return _hash_content({"vocab": tokenizer.get_vocab()}, special)
    text = backend.to_str()
    key = hashlib.sha256(json.dumps([text, special]).encode()).digest()  # takes a tenth of the time of parsing it
    if key not in _KNOWN:
        _KNOWN[key] = _hash_content(json.loads(text), special)
    return _KNOWN[key]


def _hash_content(content: dict[str, Any], special: list[str]) -> str:
    content |= {"padding": None, "truncation": None, "special": special}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
