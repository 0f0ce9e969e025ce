"""Checkpoints: everything a run needs to resume exactly (`State`), in one safetensors file, written atomically.

`checkpoints/latest.json` names the newest; it is replaced once that file is on disk, before any older one is removed.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from saelab.distributed.mesh import Mesh
from saelab.errors import SaelabError, TrainingError
from saelab.files import (
    atomic_save_safetensors,
    atomic_write_json,
    claim_folder,
    locked,
    read_json,
    remove_leftovers,
    tensors_hash,
)
from saelab.identity import ANY, differences, refusal
from saelab.saes import SAE
from saelab.training.adam import Adam
from saelab.training.dead_features import DeadFeatures
from saelab.training.feature_shards import FeatureShard
from saelab.training.running_norm import RunningNorm
from saelab.training.sharded_checkpoint import check_folder, load_shard, read_folder, row_names, save_shard

RUN_FILE = "checkpoints/run.json"
LATEST = "checkpoints/latest.json"
_NAME = re.compile(r"step-(\d{8})(\.safetensors)?")


class AnotherRunError(TrainingError):
    """A folder holds a run with different arguments, listed in `different`."""

    def __init__(self, folder: Path, different: list[str]):
        super().__init__(
            refusal(
                folder, "run", different, "train elsewhere (--name NAME or another RUN; in Python, another out_dir)"
            )
        )
        self.folder, self.different = folder, different


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of the checkpoint taken before step `step`; with sharded features it is a folder, without the suffix."""
    path = folder / "checkpoints" / f"step-{step:08d}.safetensors"
    return path.with_suffix("") if path.with_suffix("").is_dir() else path


def list_checkpoints(folder: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    found = (_NAME.fullmatch(entry.name) for entry in (folder / "checkpoints").glob("step-*"))
    return sorted({int(match[1]) for match in found if match})


def save_checkpoint(folder: Path, step: int, keep: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the state before step `step` as the latest checkpoint; the newest `keep` up to it are kept."""
    metadata = {"step": str(step), "sha256": tensors_hash(tensors)}
    shutil.rmtree(checkpoint_path(folder, step).with_suffix(""), ignore_errors=True)
    atomic_save_safetensors(checkpoint_path(folder, step), tensors, metadata)
    note_latest(folder, step, keep)


def note_latest(folder: Path, step: int, keep: int) -> None:
    """Record the checkpoint of `step` as the latest; all but the newest `keep` up to it are removed."""
    atomic_write_json(folder / LATEST, {"step": step, "file": checkpoint_path(folder, step).name})
    for old in [known for known in list_checkpoints(folder) if known <= step][:-keep]:
        path = checkpoint_path(folder, old)
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.with_suffix(".safetensors").unlink(missing_ok=True)


def load_checkpoint(folder: Path, n_steps: int, state: Mapping[str, Tensor]) -> int:
    """Restore the latest checkpoint of the run into `state`; returns the step to resume at, 0 if there is none.

    One that is damaged, or from another run, is skipped with a warning, in favour of the newest of the others.
    """

    def read(path: Path, step: int) -> None:
        tensors = _read_checked(path, step, n_steps, state)
        for name, tensor in state.items():
            tensor.copy_(tensors[name])

    return newest_checkpoint(folder, read)


def newest_checkpoint(folder: Path, read: Callable[[Path, int], object]) -> int:
    """The step of the latest checkpoint that `read(path, step)` accepts, 0 if there is none; warns about those it skips."""
    for step in _latest_first(folder):
        path = checkpoint_path(folder, step)
        try:
            read(path, step)
        except (SafetensorError, OSError, ValueError, SaelabError) as error:
            warnings.warn(f"{path} is skipped ({error}): an older checkpoint is used, if there is one.", stacklevel=6)
            continue
        return step
    return 0


def _latest_first(folder: Path) -> list[int]:
    """Steps that have a checkpoint: the one that `latest.json` names, then the others from the newest down."""
    steps = list_checkpoints(folder)[::-1]
    try:
        latest = read_json(folder / LATEST)["step"]
    except (SaelabError, KeyError, TypeError):  # missing or altered: go by the checkpoint files
        return steps
    return sorted(steps, key=lambda step: step != latest)


def check_checkpoint(path: Path, step: int, n_steps: int) -> None:
    """Raises `ValueError`, or what reading raises, unless the file or folder is unaltered and from this step."""
    if path.is_dir():
        check_folder(path, step, n_steps)
    else:
        _tensors_of(path, step, n_steps)


def state_of(sae: SAE, adam: Adam, dead: DeadFeatures, running: RunningNorm | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, not copied."""
    tensors: dict[str, Tensor] = {f"sae.{name}": value for name, value in sae.state_dict().items()}
    tensors |= {f"adam.{name}": value for name, value in adam.state_dict().items()}
    tensors |= {} if running is None else {"gradient_norm": running.state}
    return tensors | {"tokens_since_fired": dead.tokens_since_fired}


def _read_checked(path: Path, step: int, n_steps: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint. Raises `ValueError` unless they are unaltered and fit `state`."""
    if path.is_dir():
        check_folder(path, step, n_steps)
        return read_folder(path, state)
    tensors = _tensors_of(path, step, n_steps)
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: t.shape for name, t in state.items()}:
        raise ValueError("its tensors are not those of this run")
    return tensors


def _tensors_of(path: Path, step: int, n_steps: int) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("step") != str(step) or step >= n_steps:
        raise ValueError(f"it is from step {metadata.get('step')}; the run has {n_steps} steps")
    tensors = load_file(path)
    if metadata.get("sha256") != tensors_hash(tensors):
        raise ValueError("it was altered: SHA-256 differs")
    return tensors


@contextmanager
def claimed(folder: Path | None) -> Iterator[None]:
    """Hold the lock of a run folder. Raises `SaelabError` if it is taken, `ValueError` if the folder holds something else."""
    if folder is None or (claim_folder(folder, RUN_FILE, "SAE") / "sae.json").exists():  # finished: only read
        yield
        return
    home = (folder / RUN_FILE).parent
    busy = f"Another process is training in {folder}: wait for it, or use another out_dir (--name NAME, another RUN)."
    with locked(home, busy):
        remove_leftovers(home)
        yield


def claim_run(folder: Path, arguments: Mapping[str, Any], rules: int, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Record the identity of this run in `checkpoints/run.json`; returns the environment that the run was started in.

    Raises `TrainingError` if the folder holds another run, naming the differences.
    """
    path = folder / RUN_FILE
    if not path.exists():
        atomic_write_json(path, {**arguments, "rules": rules, "environment": dict(environment)})
        return dict(environment)
    before = read_json(path)
    environment_then = before.pop("environment", None) if isinstance(before, dict) else None
    if not isinstance(environment_then, dict):
        raise TrainingError(f"{path} was not written by train: restore it from a backup, or train elsewhere.")
    before.pop("rules", None)  # a run keeps the rules it was started with (rules.py)
    asked = json.loads(json.dumps(arguments))  # as in the file, where tuples are lists
    different = differences(before, asked, {"rows": ANY})
    if different:
        raise AnotherRunError(folder, different)
    return environment_then


class State:
    """Weights, Adam's moments and the counters of one run. All ranks call each method, with the same `folder` or none."""

    def __init__(
        self,
        folder: Path | None,
        keep: int,
        sae: SAE,
        adam: Adam,
        dead: DeadFeatures,
        mesh: Mesh,
        running: RunningNorm | None = None,
    ) -> None:
        self.folder, self.keep, self.mesh = folder, keep, mesh
        self._modules = sae, adam, dead, running
        self._tensors = state_of(*self._modules)
        self._rows = row_names(sae) if isinstance(sae, FeatureShard) else None
        self._device = dead.tokens_since_fired.device

    def save(self, step: int) -> None:
        """Write the state before `step`; the newest `keep` are kept. With sharded features all ranks write."""
        first = self.mesh.world.is_main_process
        if self.folder is None or not step:
            return
        if self._rows is not None:
            path = checkpoint_path(self.folder, step).with_suffix("")
            save_shard(path, step, self._tensors, self._rows, self.mesh)
            if first:
                note_latest(self.folder, step, self.keep)
        elif first:
            save_checkpoint(self.folder, step, self.keep, state_of(*self._modules))

    def load(self, n_steps: int) -> int:
        """Restore the newest intact checkpoint, of any number of ranks and shards; returns the step to resume at."""
        found = 0
        if self.folder is not None and self.mesh.world.is_main_process:
            if self._rows is None:
                found = load_checkpoint(self.folder, n_steps, state_of(*self._modules))
            else:
                check = lambda path, step: check_checkpoint(path, step, n_steps)  # noqa: E731
                found = newest_checkpoint(self.folder, check)
        step = torch.tensor(found, device=self._device)
        self.mesh.world.broadcast_([step])
        if self._rows is None:
            self.mesh.world.broadcast_(self._tensors.values())
        elif self.folder is not None and int(step):
            load_shard(checkpoint_path(self.folder, int(step)), self._tensors, self._rows, self.mesh)
        return int(step)
