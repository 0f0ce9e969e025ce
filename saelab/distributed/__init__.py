"""Distributed training: process groups and collectives, independent of SAEs and files."""

from saelab.distributed.collectives import SINGLE_PROCESS, Ranks
from saelab.distributed.launch import apart, init_distributed, is_main_process, rank_and_world_size, set_local_device

__all__ = [
    "SINGLE_PROCESS",
    "Ranks",
    "apart",
    "init_distributed",
    "is_main_process",
    "rank_and_world_size",
    "set_local_device",
]
