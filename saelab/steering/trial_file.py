"""A file of finished batches as JSON lines, by which a search that was interrupted goes on.

The first line holds the settings, every other one a batch: it is written at once and flushed to disk, and a last line that was
cut off is dropped, as its batch will be run again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelab.errors import SaelabError
from saelab.files import atomic_write_text, writing


class TrialFile:
    """The batches in `FOLDER/NAME-HASH.jsonl`, by key; HASH is that of the settings, so other settings have a file of their own.

    Raises `SaelabError` for a file that was altered.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], name: str = "find") -> None:
        first = json.dumps(settings, sort_keys=True, ensure_ascii=False, allow_nan=False)
        self.path = folder / f"{name}-{hashlib.sha256(first.encode()).hexdigest()[:12]}.jsonl"
        if not self.path.exists():
            atomic_write_text(self.path, first + "\n")
        self.batches = self._read(json.loads(first))

    def _read(self, settings: Any) -> dict[str, Any]:
        with writing(self.path), self.path.open("rb+") as file:
            complete, found, cut_off = file.read().rpartition(b"\n")
            if cut_off:
                file.truncate(len(complete) + len(found))
        batches: dict[str, Any] = {}
        for number, line in enumerate(complete.split(b"\n"), 1):
            try:
                told = json.loads(line)
                if number == 1:
                    self._check(told, settings)
                else:
                    batches[told["batch"]] = told["results"]
            except (ValueError, KeyError, TypeError) as error:
                raise SaelabError(f"{self.path}, line {number}, is no batch of trials ({error}): remove it.") from error
        return batches

    def _check(self, told: Any, settings: Any) -> None:
        """Raises `ValueError` naming the first setting that differs."""
        differing = [name for name in settings if not isinstance(told, dict) or told.get(name) != settings[name]]
        if differing:
            raise ValueError(f"its settings have another {differing[0]}")

    def add(self, key: str, results: Any) -> None:
        """Append a batch."""
        line = json.dumps({"batch": key, "results": results}, ensure_ascii=False, allow_nan=False)
        with writing(self.path), self.path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.batches[key] = results
