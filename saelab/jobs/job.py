"""A job as its folder tells it: what was asked, by which process it is done, how far it is, and how it ended."""

from __future__ import annotations

import json
import math
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saelab.errors import SaelabError
from saelab.files import read_json
from saelab.jobs.kinds import Kind, from_arguments
from saelab.jobs.processes import Process

RECORD, PROGRESS, LOG, CANCEL = "job.json", "progress.jsonl", "log.txt", "cancel"
NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")
STARTING_SECONDS, SILENT_SECONDS = 30.0, 60.0
_TAIL = 20_000
_LATEST = 1e11  # seconds since 1970 that are a time
ACTIVE = ("starting", "running", "stopping")


class End(NamedTuple):
    """How a job ended."""

    state: str
    """"done", "failed" or "cancelled"."""
    time: float
    text: str


class Progress(NamedTuple):
    """How far a job is, when it last said so."""

    time: float
    what: str
    done: float
    total: float | None
    unit: str
    remaining: float | None
    """Seconds, as far as can be told."""


@dataclass(frozen=True)
class Job:
    """One job; times are seconds since 1970. Read again, it may have gone on."""

    folder: Path
    kind: str
    sae: str
    arguments: dict[str, Any]
    created: float
    process: Process | None
    end: End | None

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def state(self) -> str:
        """ "starting", "running", "stopping", "done", "failed", "cancelled", or "lost": its process is gone without a result."""
        if self.end is not None:
            return self.end.state
        if self.process is None:
            runs, state = time.time() - self.created < STARTING_SECONDS, "starting"
        else:
            runs = self.process.is_running if self.process.is_here else self.silent_seconds < SILENT_SECONDS
            state = "running"
        if self.was_cancelled:
            return "stopping" if runs else "cancelled"
        return state if runs else "lost"

    @property
    def silent_seconds(self) -> float:
        """Seconds since its last sign of life."""
        with suppress(OSError):
            return time.time() - (self.folder / PROGRESS).stat().st_mtime
        return time.time() - self.created

    @property
    def was_cancelled(self) -> bool:
        """Whether `cancel` was called for it."""
        return (self.folder / CANCEL).exists()

    @property
    def progress(self) -> Progress | None:
        """The last that it said of itself; None before it has."""
        for line in reversed(_lines(self.folder / PROGRESS)):
            with suppress(KeyError, TypeError, ValueError):
                return _progress(line)
        return None

    def kind_of_work(self) -> Kind:
        """What it does. Raises `ValueError` if the record was altered."""
        return from_arguments(self.kind, self.arguments)

    def log(self, lines: int = 40) -> str:
        """The end of its log; of a progress bar only the last state."""
        text = _tail(self.folder / LOG)
        kept = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        return "\n".join(kept[-lines:]).strip("\n")


def jobs(run: str | Path) -> list[Job]:
    """The jobs of a RUN, the newest first."""
    home = home_of(Path(run))
    folders = [one for one in home.iterdir() if NAME.fullmatch(one.name)] if home.is_dir() else []
    found = [_read_or_say(folder) for folder in folders if (folder / RECORD).exists()]
    return sorted(found, key=lambda job: (job.created, job.id), reverse=True)


def home_of(run: Path) -> Path:
    """The folder of the jobs of a RUN, or of the RUN that this SAE folder is in."""
    run = Path(run)
    return (run.parent if (run / "sae.json").exists() else run) / "jobs"


def read_job(folder: Path) -> Job:
    """The job in a folder. Raises `SaelabError` if its record is missing or altered."""
    record = read_json(folder / RECORD)
    try:
        process = Process(**record["process"]) if record["process"] else None
        end = End(**record["end"]) if record["end"] else None
        texts = [record["kind"], record["sae"], *(end or ["", 0, ""])[::2], *(process or [""])[:1]]
        if not all(isinstance(text, str) for text in texts) or (process and not isinstance(process.pid, int)):
            raise ValueError("a value is of another type")
        if end is not None and (end.state not in ("done", "failed", "cancelled") or not 0 <= end.time < _LATEST):
            raise ValueError("it ended in no way that is known")
        if not 0 <= record["created"] < _LATEST:
            raise ValueError("it was never created")
        return Job(folder, record["kind"], record["sae"], dict(record["arguments"]), record["created"], process, end)
    except (KeyError, TypeError, ValueError) as error:
        raise SaelabError(
            f"{folder / RECORD} is no record of a job ({error}): it was altered; remove its folder."
        ) from error


def _read_or_say(folder: Path) -> Job:
    try:
        return read_job(folder)
    except SaelabError as error:
        when = (folder / RECORD).stat().st_mtime
        return Job(folder, "?", "?", {}, when, None, End("failed", when, str(error)))


def _progress(line: dict[str, Any]) -> Progress:
    """A line of progress. Raises `KeyError`, `TypeError` or `ValueError` if it says nothing of how far the job is."""
    done, total, remaining = float(line["done"]), float(line["total"] or 0), float(line.get("remaining") or 0)
    if not (0 <= done < math.inf and 0 <= total < math.inf and 0 <= remaining < math.inf):
        raise ValueError("no share")
    left = remaining if "remaining" in line else None
    return Progress(float(line["time"]), str(line["what"]), done, total or None, str(line["unit"]), left)


def _tail(path: Path) -> str:
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _TAIL, 0))
        return file.read(_TAIL).decode("utf-8", "replace")
    return ""


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in _tail(path).splitlines():
        with suppress(json.JSONDecodeError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found
