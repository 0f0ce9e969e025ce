"""The ranks of a job as a 2D mesh: one dimension splits the rows of a batch, the other the features of an SAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from saelab.distributed.collectives import SINGLE_PROCESS, Ranks


@dataclass(frozen=True)
class Mesh:
    """This rank's position in the mesh. Rank r of `world` has feature shard r % S and row share r // S."""

    world: Ranks = SINGLE_PROCESS
    data: Ranks = SINGLE_PROCESS
    """Ranks with the same features and different rows."""
    feature: Ranks = SINGLE_PROCESS
    """Ranks with the same rows and different features."""
    device_mesh: Any = None
    """The `DeviceMesh`, if features are sharded."""


def build_mesh(world: Ranks, feature_shards: int, device: str | None = None) -> Mesh:
    """The mesh ("data", "feature") of all ranks. Raises `ValueError` if their number is not a multiple of the shards."""
    if feature_shards == 1:
        return Mesh(world, world)
    if world.size % feature_shards:
        raise ValueError(
            f"feature_shards={feature_shards} needs a multiple of {feature_shards} processes; this job has {world.size}: "
            f"use torchrun --nproc-per-node {feature_shards}, or change feature_shards."
        )
    shape = (world.size // feature_shards, feature_shards)
    device_type = torch.device(device).type if device else "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("data", "feature"))
    data, feature = (
        Ranks(mesh.get_group(name)) if mesh[name].size() > 1 else SINGLE_PROCESS for name in ("data", "feature")
    )
    return Mesh(world, data, feature, mesh)
