"""Checkpoints of an SAE whose features are sharded over ranks: a folder of safetensors files, one per rank, written and read
by `torch.distributed.checkpoint`. Each file records which rows it holds, so that any number of ranks can read them.

The folder has a temporary name until every file is on disk; its `files.json` lists their SHA-256.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from saelab.distributed.mesh import Mesh
from saelab.files import atomic_write_json, fsync_dir, process_number, read_json, sha256_file, temporary_path, writing
from saelab.training.feature_shards import ROWS, FeatureShard

FILES = "files.json"


def row_names(shard: FeatureShard) -> set[str]:
    """Names, as in `checkpoint.state_of`, of the checkpoint tensors that have one row per feature."""
    moments = {
        f"adam.{index}.{moment}"
        for index, (name, _) in enumerate(shard.named_parameters())
        for moment in ("exp_avg", "exp_avg_sq")
        if name in ROWS
    }
    return moments | {f"sae.{name}" for name in ROWS} | {"tokens_since_fired"}


def save_shard(path: Path, step: int, state: Mapping[str, Tensor], rows: set[str], mesh: Mesh) -> None:
    """Write the folder `path`, all ranks together; the tensors named in `rows` are this rank's part."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    number = torch.tensor(process_number(), device=next(iter(state.values())).device)
    mesh.world.broadcast_([number])
    temporary = temporary_path(path, int(number))
    with writing(path):
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        save(_placed(state, rows, mesh), storage_writer=writer)
        local_files = temporary.glob(f"shard-{mesh.world.rank + 1:05d}-*.safetensors")
        hashes = {file.name: sha256_file(file) for file in local_files}
        said = torch.frombuffer(bytearray(json.dumps(hashes).encode()), dtype=torch.uint8).to(number.device)
        all_hashes = [json.loads(bytes(one.tolist())) for one in mesh.world.all_gather(said)]
        if mesh.world.is_main_process:
            files = {name: digest for hashes_of_rank in all_hashes for name, digest in hashes_of_rank.items()}
            atomic_write_json(temporary / FILES, {"step": step, "files": files})
            shutil.rmtree(path, ignore_errors=True)
            temporary.replace(path)
            fsync_dir(path.parent)
    mesh.world.barrier(number.device)  # no rank continues before the folder has its final name


def check_folder(path: Path, step: int, n_steps: int) -> None:
    """Raises `ValueError` unless the folder is complete, unaltered and from this step."""
    known = read_json(path / FILES)
    if known.get("step") != step or step >= n_steps:
        raise ValueError(f"it is from step {known.get('step')}; the run has {n_steps} steps")
    for name, digest in known["files"].items():
        if sha256_file(path / name) != digest:
            raise ValueError(f"{name} was altered: SHA-256 differs")


def read_folder(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of a sharded checkpoint, read by one process. Raises `ValueError` if shapes differ from `like`."""
    tensors = {name: torch.empty_like(x, device="cpu") for name, x in like.items()}
    _load(path, tensors, no_dist=True)
    return tensors


def load_shard(path: Path, state: Mapping[str, Tensor], rows: set[str], mesh: Mesh) -> None:
    """Fill this rank's tensors from a checkpoint folder of any number of shards, or from the file of an unsharded run."""
    if path.is_dir():
        _load(path, _placed(state, rows, mesh))
        return
    with safe_open(path, "pt") as file:
        for name, tensor in state.items():
            start = mesh.feature.rank * len(tensor) if name in rows else 0
            stored = file.get_slice(name)
            tensor.copy_(stored[start : start + len(tensor)] if tensor.ndim else file.get_tensor(name))


def _load(path: Path, state: Mapping[str, Any], no_dist: bool = False) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is intended
        load(dict(state), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=no_dist)


def _placed(state: Mapping[str, Tensor], rows: set[str], mesh: Mesh) -> dict[str, Any]:
    """The tensors with their position in the whole, as `torch.distributed.checkpoint` expects; not copied."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Replicate(), Shard(0)]
    return {
        name: DTensor.from_local(x, mesh.device_mesh, placements, run_check=False) if name in rows else x
        for name, x in state.items()
    }
