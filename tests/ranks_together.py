"""Several processes on gloo in one test: `together(4, worker, folder, ...)` calls `worker(rank, folder, ...)` in each.

They are forked from a server that has imported torch once, meet through a file, and compute with one thread. What they
find they leave in `folder`. A worker stands in a module of its own, which the processes can import by name.
"""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SECONDS = 60


def together(n: int, worker: Callable[..., None], folder: Path, *arguments: Any) -> list[int | None]:
    """The exit codes, 0 for a worker that returned; an `AssertionError` says what happened where one raised or hung."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "saelab.training", "safetensors.torch"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    for old in folder.glob("error-*.txt"):
        old.unlink()
    started = [context.Process(target=_work, args=(worker, rank, n, folder, *arguments)) for rank in range(n)]
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # each process would run the main module first, here perhaps a Streamlit page
        patch.setitem(sys.modules, "__main__", ModuleType("__main__"))
        for process in started:
            process.start()
    for process in started:
        process.join(SECONDS)
    hung = [rank for rank, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
        process.join()
    said = "\n".join(path.read_text() for path in sorted(folder.glob("error-*.txt")))
    assert not hung, f"ranks {hung} hung; {said}"
    assert not said, said
    return [process.exitcode for process in started]


def _work(worker: Callable[..., None], rank: int, n: int, folder: Path, *arguments: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if n > 1:
            meeting, limit = f"file://{folder / 'store'}", timedelta(seconds=SECONDS)
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=n, timeout=limit)
        worker(rank, folder, *arguments)
        if n > 1:
            dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None
