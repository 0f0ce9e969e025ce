"""Snapshots: the SAE of a run as it is every `TrainConfig.snapshot_every` steps, in the format of a finished one.

They stand in the SAE's folder (`saelab.runs.snapshot_folder`). Each is written under a temporary name and then renamed, so
that it is there complete or not at all, and before the checkpoint of its step, so that a run which goes on from there has it.
What is written is a copy: the training is not changed by it.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from torch import Tensor

from saelab.files import fsync_dir, remove_leftovers, temporary_path, writing
from saelab.io import save_sae
from saelab.runs import snapshot_folder
from saelab.saes import SAE
from saelab.saes.provenance import Provenance


def is_due(every: int | None, step: int, n_steps: int) -> bool:
    """Whether a snapshot is taken before this step; never before the first, nor after the last, which leaves the SAE itself."""
    return every is not None and 0 < step < n_steps and step % every == 0


def has_snapshot(sae_dir: Path, step: int) -> bool:
    """Whether the snapshot before this step was taken already."""
    return (snapshot_folder(sae_dir, step) / "sae.json").exists()


@torch.no_grad()
def save_snapshot(sae_dir: Path, step: int, sae: SAE, provenance: Provenance, x: Tensor, fold: bool) -> Path:
    """Write a copy of `sae`, with golden inputs taken from the raw activations `x`; `fold`: with decoder rows of norm 1, as a
    finished SAE has them. Thresholds are the running ones of the training: they are not calibrated."""
    path = snapshot_folder(sae_dir, step)
    temporary = temporary_path(path)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        remove_leftovers(path.parent)
        copied = copy.deepcopy(sae)
        copied.provenance = provenance
        if fold:
            copied.fold_decoder_norms()
        save_sae(copied.eval(), temporary, golden_inputs=x)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
        fsync_dir(path.parent)
    return path
