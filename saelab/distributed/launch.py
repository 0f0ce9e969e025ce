"""Joining the other processes that `torchrun` started: nothing to configure, the environment says it all."""

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
"""Seconds that a rank waits for the others before it gives up; the default of 60 ends a job within a minute."""


_apart: list[bool] = []


def rank_and_world_size() -> tuple[int, int]:
    """The number of this process and how many there are, as `torchrun` says; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def set_local_device() -> None:
    """Under torchrun each process of a machine takes a GPU of its own."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


@contextmanager
def apart() -> Iterator[None]:
    """Inside a `with` each process of the job works for itself: `init_distributed` gives `SINGLE_PROCESS`."""
    set_local_device()
    _apart.append(True)
    try:
        yield
    finally:
        _apart.pop()


def is_main_process() -> bool:
    """Is this rank 0, or the only process? Files and messages are its business."""
    return rank_and_world_size()[0] == 0 if not _joined() else dist.get_rank() == 0


def init_distributed() -> Ranks:
    """All processes of this job; `SINGLE_PROCESS` where there is one. The first call connects them.

    A group that the caller has made with `torch.distributed.init_process_group` is taken as it is. Under torchrun each
    process gets the GPU of its local rank. Raises `ValueError` for a `SAELAB_RANK_TIMEOUT` that is no number of seconds.
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
