"""The journal of a harvest: what is safely on disk, and whether a folder's harvest can resume with given arguments."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import warnings
from pathlib import Path
from typing import Any

from saelab.activation_cache.layout import BLOCK_JOURNALS, JOURNAL, MANIFEST, config_hash
from saelab.errors import CacheError, SaelabError
from saelab.files import fsync_dir, writing
from saelab.identity import LATER, differences, refusal

_BEGINNING = b'{"kind": "'  # how every line begins


class BusyError(CacheError):
    """Another process has locked the journal."""


class Journal:
    """Append-only record of what is safely on disk, for a cache or a block (`name`); locked by one process at a time.

    `entries` holds every complete line. A partially written last line (the process was killed) is truncated.
    While another process holds the lock, raises `BusyError`, or waits for it with `wait`.
    """

    def __init__(self, folder: Path, name: str = JOURNAL, wait: bool = False):
        self.path = folder / name
        with writing(self.path):
            self.path.parent.mkdir(exist_ok=True)
            self._file = self.path.open("ab+", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            self._file.close()
            raise BusyError(
                f"another process is harvesting into {folder}: wait for it, or give another out_dir (to share a harvest "
                "among processes, pass block_contexts to all of them)."
            ) from error
        self._lock = threading.Lock()
        self.entries: list[dict[str, Any]] = []
        try:
            self._read()
        except CacheError:
            self.close()
            raise
        fsync_dir(self.path.parent)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Entries of one kind: "start", "storage", "mask", "shard" or "tokens"; a block also has an "end"."""
        return [entry for entry in self.entries if entry["kind"] == kind]

    def append(self, entry: dict[str, Any]) -> None:
        """Append one line and flush it to disk. Raises `SaelabError` on a full disk, leaving the journal unchanged."""
        with self._lock:
            end = self._file.seek(0, os.SEEK_END)
            try:
                with writing(self.path):
                    self._file.write(json.dumps(entry).encode() + b"\n")
                    os.fsync(self._file.fileno())
            except SaelabError:
                self._file.truncate(end)
                raise
            self.entries.append(entry)

    def clear(self) -> None:
        """Delete all entries, to start from scratch."""
        self._file.truncate(0)
        self.entries = []

    def close(self) -> None:
        """Release the lock."""
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        if content[: len(_BEGINNING)] != _BEGINNING[: len(content)]:
            raise CacheError(f"{self.path} is not the journal of an activation cache: give another out_dir.")
        lines = content.split(b"\n")
        good = 0
        for number, line in enumerate(lines[:-1]):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict) or "kind" not in entry:
                    raise ValueError(f"{entry} is not an entry")
                self.entries.append(entry)
            except ValueError as error:
                if number < len(lines) - 2 or not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                    raise CacheError(
                        f"{self.path} line {number + 1} was altered: delete the cache and harvest again."
                    ) from error
                break
            good += len(line) + 1
        self._file.truncate(good)


def rows_on_disk(folder: Path) -> int:
    """Rows in the finished shards of a harvest that may still be running; read-only."""
    paths = [folder / JOURNAL, *(folder / BLOCK_JOURNALS).glob("*.jsonl")]
    lines = [line for path in paths for line in path.read_bytes().split(b"\n")[:-1]]
    return sum(entry["rows"] for entry in map(json.loads, lines) if entry["kind"] == "shard")


def begun_with(folder: Path) -> dict[str, Any]:
    """The config of the harvest begun in `folder`, {} if there is none; read-only."""
    path = folder / JOURNAL
    line = path.read_bytes().partition(b"\n")[0] if path.is_file() else b""
    try:
        return json.loads(line)["config"]
    except (ValueError, KeyError, TypeError):
        return {}


def begin(folder: Path, journal: Journal, config: dict[str, Any], environment: dict[str, Any]) -> bool:
    """Start or resume a journal; returns whether this cache is finished. Raises `ValueError` if the arguments differ."""
    finished = (folder / MANIFEST).exists()
    started = journal.of_kind("start")
    calibrated = any(entry.get("rows") for entry in journal.of_kind("mask"))
    blocks = calibrated and "block_contexts" in started[0]["config"]  # other processes may be harvesting them
    if started and (finished or blocks or journal.of_kind("shard")):
        held, asked = (list(one["hooks"]) for one in (started[0]["config"], config))
        if set(held) != set(asked):
            raise ValueError(
                f"{folder} holds the activations of {', '.join(held)}, not {', '.join(asked)}: harvest those into another "
                "RUN (in Python, another out_dir), or name all hooks in one harvest."
            )
        different = differences(started[0]["config"], config, LATER)
        if different:
            raise ValueError(
                refusal(folder, "cache", different, "harvest into another RUN (in Python, another out_dir)")
            )
        if not finished and started[0]["environment"] != environment:
            changed = "; ".join(differences(started[0]["environment"], environment))
            warnings.warn(
                f"this harvest was begun in another environment ({changed}): its shards may differ in their last bits "
                f"from those of an uninterrupted run.",
                stacklevel=3,
            )
        return finished
    if finished:
        raise CacheError(f"{folder / JOURNAL} was emptied: delete the cache and harvest again.")
    journal.clear()
    if started:
        for leftover in (*folder.rglob("*.safetensors"), *folder.glob(f"{BLOCK_JOURNALS}/*.jsonl")):
            leftover.unlink()  # of an attempt that never finished a shard
    start = {"kind": "start", "config": config, "config_hash": config_hash(config), "environment": environment}
    journal.append(start)
    return False
