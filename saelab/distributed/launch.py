"""Joining the other processes that `torchrun` started: nothing to configure, the environment says it all."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from saelab.distributed.ranks import ALONE, Ranks

TIMEOUT = "SAELAB_RANK_TIMEOUT"
"""Seconds that a rank waits for the others before it gives up; the default of 60 ends a job within a minute."""


def is_first() -> bool:
    """Is this rank 0, or the only process? Files and messages are its business."""
    return os.environ.get("RANK", "0") == "0" if not _joined() else dist.get_rank() == 0


def join() -> Ranks:
    """All processes of this job; `ALONE` where there is one. The first call connects them.

    A group that the caller has made with `torch.distributed.init_process_group` is taken as it is. Under torchrun each
    process gets the GPU of its local rank. Raises `ValueError` for a `SAELAB_RANK_TIMEOUT` that is no number of seconds.
    """
    if not _joined():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return ALONE
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group(timeout=timedelta(seconds=_seconds()))
        atexit.register(_leave)
    return Ranks(dist.group.WORLD) if dist.get_world_size() > 1 else ALONE


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
