"""Starts and cancels jobs."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from threading import Thread

from saelab.errors import SaelabError
from saelab.files import atomic_write_json, locked, writing
from saelab.jobs.job import ACTIVE, CANCEL, LOG, RECORD, Job, home_of, jobs, read_job
from saelab.jobs.kinds import Kind
from saelab.runs import SaeRun, find_saes

PATIENCE = 10.0
"""Seconds after which a second `cancel` ends a process that did not heed the first."""


def start(run: str | Path, sae: str, kind: Kind) -> Job:
    """Start a job on the SAE of this name in a RUN.

    Raises `ValueError` for a bad argument or an unknown SAE, `SaelabError` if something that the job needs is missing, or another
    job is at work on the SAE: one at a time writes a store, and a store that is written is not read.
    """
    found = {one.name: one for one in find_saes(run)}
    if sae not in found:
        raise ValueError(f"sae={sae!r} is not in {run}; expected one of {', '.join(found)}.")
    kind.check(found[sae])
    home = home_of(Path(run))
    with locked(home, f"Another job is being started in {home}: try again."):
        _refuse_a_second(Path(run), sae, kind)
        folder = _new_folder(home)
        asked = {"kind": kind.name, "sae": sae, "arguments": asdict(kind), "created": time.time()}
        atomic_write_json(folder / RECORD, {"format_version": 1, **asked, "process": None, "end": None})
        _launch(folder)
    return read_job(folder)


def cancel(job: Job) -> str:
    """End a job, as Ctrl-C ends a command: what it has done so far is kept. Asked again after `PATIENCE` seconds, the process is
    killed. Returns the state that the job then has. Raises `SaelabError` for a job that another machine does."""
    if job.state not in ACTIVE:
        return job.state
    if job.process is None:
        raise SaelabError("The job is just being started: try again in a moment.")
    if not job.process.is_here:
        raise SaelabError(f"The job runs on {job.process.host}: cancel it there.")
    asked = job.folder / CANCEL
    with writing(asked):
        patient = not asked.exists() or time.time() - asked.stat().st_mtime < PATIENCE
        asked.open("a").close()
    job.process.send(signal.SIGTERM if patient else signal.SIGKILL)
    return read_job(job.folder).state


def sae_of(run: str | Path, job: Job) -> SaeRun:
    """The SAE that a job is about. Raises `SaelabError` if the RUN no longer has it."""
    for one in find_saes(run):
        if one.name == job.sae:
            return one
    raise SaelabError(f"{job.sae} is no longer in {run}.")


def _refuse_a_second(run: Path, sae: str, kind: Kind) -> None:
    """Raise `SaelabError` if a job is at work with which this one does not go together."""
    for job in jobs(run):
        if job.sae == sae and job.state in ACTIVE:
            other = job.kind_of_work()
            if kind.changes_store or other.changes_store or kind.name == other.name:
                raise SaelabError(
                    f"{other.title} of {sae} is at work (job {job.id}), and {kind.title.lower()} cannot go beside it: wait until "
                    "it has ended, or cancel it."
                )


def _new_folder(home: Path) -> Path:
    folder = home / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with writing(folder):
        folder.mkdir()
    return folder


def _launch(folder: Path) -> None:
    """Run the worker apart from this process: in a session of its own, so that neither Ctrl-C here nor the end of this process
    ends it; with the same saelab, whatever lies in the current folder."""
    package = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    with writing(folder), (folder / LOG).open("ab") as log:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "saelab.jobs", str(folder.resolve())],
            env=os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "1"},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    Thread(target=worker.wait, daemon=True).start()  # or it would stay a zombie
