"""Joins the processes that `torchrun` started; configured by environment variables alone."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from saelab.distributed.collectives import SINGLE_PROCESS, Ranks

TIMEOUT = "SAELAB_RANK_TIMEOUT"
"""Environment variable: seconds that a rank waits for the others before it gives up, 60 by default."""


_apart: list[bool] = []


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process and world size, as set by `torchrun`; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def set_local_device() -> None:
    """Under torchrun, give each process on a machine its own GPU."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


@contextmanager
def apart() -> Iterator[None]:
    """Inside a `with` block each process works on its own: `init_distributed` returns `SINGLE_PROCESS`."""
    set_local_device()
    _apart.append(True)
    try:
        yield
    finally:
        _apart.pop()


def is_main_process() -> bool:
    """Whether this is rank 0 or the only process, the one that writes files and messages."""
    return rank_and_world_size()[0] == 0 if not _joined() else dist.get_rank() == 0


def init_distributed() -> Ranks:
    """The ranks of this job; `SINGLE_PROCESS` if there is only one process. The first call connects them.

    A group that the caller created with `torch.distributed.init_process_group` is used as it is. Under torchrun each process
    gets the GPU of its local rank. Raises `ValueError` if `SAELAB_RANK_TIMEOUT` is not a number of seconds.
    """
    if _apart:
        return SINGLE_PROCESS
    if not _joined():
        if rank_and_world_size()[1] < 2 or "RANK" not in os.environ:
            return SINGLE_PROCESS
        set_local_device()
        dist.init_process_group(timeout=timedelta(seconds=_seconds()))
        atexit.register(_leave)
    return Ranks(dist.group.WORLD) if dist.get_world_size() > 1 else SINGLE_PROCESS


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _seconds() -> float:
    given = os.environ.get(TIMEOUT, "60")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(f"{TIMEOUT}={given!r} must be a number of seconds, such as 60.")
    return seconds


def _leave() -> None:
    if _joined():
        dist.destroy_process_group()
