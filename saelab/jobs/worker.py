"""What the process of a job does: the work, a sign of life every few seconds, and a word of how it ended."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from saelab.errors import explain
from saelab.files import atomic_write_json, locked, read_json
from saelab.jobs.control import sae_of
from saelab.jobs.job import CANCEL, PROGRESS, RECORD, Job, read_job
from saelab.jobs.processes import this_process

_LOOK_SECONDS, _SIGN_SECONDS = 1.0, 10.0


def work(folder: Path) -> int:
    """Do the job in `folder`; returns 0 if it came to its end, 1 if it failed, 130 if it was cancelled."""
    _note(folder, process=this_process()._asdict())  # first, before anything that takes a while
    with _sigterm_interrupts(), _signs_of_life(folder / PROGRESS):
        state, text = _outcome(folder)
    _note(folder, end={"state": state, "time": time.time(), "text": " ".join(text.split())})
    return {"done": 0, "failed": 1, "cancelled": 130}[state]


def _outcome(folder: Path) -> tuple[str, str]:
    try:
        if (folder / CANCEL).exists():
            raise KeyboardInterrupt
        return "done", _done(read_job(folder))
    except KeyboardInterrupt:
        return "cancelled", "What it had done is kept: started again, it goes on from there."
    except Exception as error:
        said = explain(error)
        sys.stderr.write(said + "\n" if said else traceback.format_exc())
        return "failed", said or f"{type(error).__name__}: {error}. This is a fault of saelab; the log has more."


def _done(job: Job) -> str:
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("saelab").setLevel(logging.INFO)
    sae, kind = sae_of(job.folder.parent.parent, job), job.kind_of_work()
    kind.check(sae)
    busy = f"The features of {sae.name} are being collected by another process: wait until it has ended."
    with nullcontext() if kind.changes_store else locked(sae.features_dir, busy, shared=True):
        return kind.run(sae)


def _note(folder: Path, **fields: Any) -> None:
    """Add fields to the record of a job."""
    atomic_write_json(folder / RECORD, read_json(folder / RECORD) | fields)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """`cancel` is taken as Ctrl-C, once: what is then saved is not interrupted again."""

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _signs_of_life(path: Path) -> Iterator[None]:
    """Append to `path`, from a thread, how far the newest progress bar is: when that changes, and every ten seconds at least."""
    ended = Event()

    def watch() -> None:
        last, since = None, 0.0
        while True:
            said = _bar()
            if said != last or time.monotonic() - since > _SIGN_SECONDS:
                last, since = said, time.monotonic()
                with suppress(OSError), path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"time": time.time(), **said}) + "\n")
            if ended.wait(_LOOK_SECONDS):
                return

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _bar() -> dict[str, Any]:
    """The newest progress bar that is shown; {} if there is none."""
    found = sys.modules.get("tqdm")
    bars = list(getattr(found.tqdm, "_instances", ())) if found else []
    bars = sorted((bar for bar in bars if bar.desc and not bar.disable), key=lambda bar: bar.start_t)
    if not bars:
        return {}
    bar = bars[-1]
    rate = bar.format_dict["rate"] or (bar.n - bar.initial) / max(time.time() - bar.start_t, 1e-3)
    left = (bar.total - bar.n) / rate if bar.total and rate else None
    what = {"what": bar.desc.rstrip(": "), "done": bar.n, "total": bar.total or None, "unit": bar.unit}
    return what | ({"remaining": round(left, 1)} if left is not None else {})
