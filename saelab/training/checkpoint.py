"""Checkpoints: everything a run needs to go on exactly, in one safetensors file, written whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saelab.errors import TrainingError
from saelab.files import atomic_save_safetensors, atomic_write_json, differences, read_json
from saelab.saes import SAE
from saelab.training.adam import Adam
from saelab.training.dead_features import DeadFeatures

RUN_FILE = "checkpoints/run.json"
KEEP = 2
_NAME = re.compile(r"step-(\d{8})\.safetensors")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint taken before step `step` lives."""
    return folder / "checkpoints" / f"step-{step:08d}.safetensors"


def list_checkpoints(folder: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    found = (_NAME.fullmatch(entry.name) for entry in (folder / "checkpoints").glob("step-*.safetensors"))
    return sorted(int(match[1]) for match in found if match)


def save_checkpoint(folder: Path, step: int, sae: SAE, adam: Adam, dead: DeadFeatures) -> None:
    """Write the state before step `step`; the newest two are kept."""
    tensors: dict[str, Tensor] = {f"sae.{name}": value for name, value in sae.state_dict().items()}
    tensors |= {f"adam.{name}": value for name, value in adam.state_dict().items()}
    tensors["tokens_since_fired"] = dead.tokens_since_fired
    atomic_save_safetensors(checkpoint_path(folder, step), tensors)
    for old in list_checkpoints(folder)[:-KEEP]:
        checkpoint_path(folder, old).unlink(missing_ok=True)


def load_checkpoint(folder: Path, sae: SAE, adam: Adam, dead: DeadFeatures) -> int:
    """Restore the newest readable checkpoint in place; gives the step to go on with, 0 when there is none."""
    for step in reversed(list_checkpoints(folder)):
        try:
            tensors = load_file(checkpoint_path(folder, step))
        except (SafetensorError, OSError):
            continue  # damaged from outside: the one before it is whole
        sae.load_state_dict({n.removeprefix("sae."): t for n, t in tensors.items() if n.startswith("sae.")})
        adam.load_state_dict({n.removeprefix("adam."): t for n, t in tensors.items() if n.startswith("adam.")})
        dead.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        return step
    return 0


def claim_run(folder: Path, arguments: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Note what this run is in `checkpoints/run.json`; a folder of another run is refused, naming the difference.

    Gives the environment the run was begun in.
    """
    path = folder / RUN_FILE
    if not path.exists():
        atomic_write_json(path, {**arguments, "environment": dict(environment)})
        return dict(environment)
    before = read_json(path)
    environment_then = before.pop("environment")
    different = differences(before, arguments)
    if different:
        raise TrainingError(
            f"{folder} holds another run ({'; '.join(different)}). Use the same arguments to go on, or train elsewhere "
            "(--name NAME or another RUN; in Python another out_dir)."
        )
    return environment_then
