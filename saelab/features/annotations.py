"""`annotations.sqlite` in a RUN: labels, notes, lists, scores and measured effects of features, which people and jobs add.

The feature store itself never changes. Every entry is a row that is only ever added, with an id of its own; the latest row of
its kind counts, and an entry is taken back by a row without value. So two browsers write side by side, and two files merge by
taking the rows of both: nothing is lost.
"""

from __future__ import annotations

import getpass
import json
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from saelab.errors import StoreError

NAME = "annotations.sqlite"
KINDS = ("label", "model_label", "note", "list", "score", "effect", "steer", "verified")
_DDL = (
    "CREATE TABLE IF NOT EXISTS entry (id TEXT PRIMARY KEY, sae TEXT NOT NULL, feature INTEGER NOT NULL, kind TEXT NOT NULL, "
    "name TEXT NOT NULL, value TEXT, author TEXT NOT NULL, time TEXT NOT NULL)"
)
_INDEX = "CREATE INDEX IF NOT EXISTS entry_by_feature ON entry (sae, kind, feature, name, time, id)"
_COLUMNS = ("id", "sae", "feature", "kind", "name", "value", "author", "time")
ALL_FEATURES = -1
"""The feature of entries that belong to the whole SAE."""


class Entry(NamedTuple):
    """One addition. `name` tells entries of a kind apart: the list, the score, the explainer."""

    feature: int
    kind: str
    name: str
    value: Any
    """None: taken back."""
    author: str
    time: str


class Annotations:
    """The annotations of one SAE in the file at `path`, which is created at the first addition."""

    def __init__(self, path: str | Path, sae_hash: str) -> None:
        self.path, self.sae_hash = Path(path), sae_hash

    def add(self, feature: int, kind: str, value: Any, name: str = "", author: str | None = None) -> None:
        """Add an entry; `value` is anything that JSON holds, None takes the earlier one back. Raises `ValueError` for an unknown
        kind, `StoreError` if the file cannot be written."""
        self.add_all([feature], kind, value, name, author)

    def add_all(
        self, features: Iterable[int], kind: str, value: Any, name: str = "", author: str | None = None
    ) -> None:
        """As `add`, the same entry for several features: all of them, or none where the file cannot be written."""
        self._insert([self._row(feature, kind, value, name, author) for feature in features])

    def add_each(self, kind: str, values: Mapping[int, Any], name: str = "", author: str | None = None) -> None:
        """As `add`, one value for each feature, of which those that stand already are left out: all of the others, or none."""
        known = {entry.feature: entry.value for entry in self.latest(kind, name)}
        new = {feature: value for feature, value in values.items() if value is None or known.get(feature) != value}
        self._insert([self._row(feature, kind, value, name, author) for feature, value in new.items()])

    def latest(self, kind: str, name: str | None = None, feature: int | None = None) -> list[Entry]:
        """The latest entry of each feature and name that has not been taken back, by feature and name; of one feature alone if it
        is given."""
        if not self.path.exists():
            return []
        given = {key: value for key, value in (("name", name), ("feature", feature)) if value is not None}
        clause, values = "".join(f"AND {key} = ? " for key in given), list(given.values())
        rows = self._read(
            "SELECT feature, kind, name, value, author, max(time || id), time FROM entry WHERE sae = ? AND kind = ? "
            f"{clause} GROUP BY feature, name ORDER BY feature, name",
            [self.sae_hash, kind, *values],
        )
        return [
            Entry(feature, kind, name, json.loads(value), author, time)
            for feature, kind, name, value, author, _, time in rows
            if value is not None
        ]

    def of(self, feature: int) -> list[Entry]:
        """What stands of one feature, of all kinds."""
        return [entry for kind in KINDS for entry in self.latest(kind) if entry.feature == feature]

    def export(self, path: str | Path) -> int:
        """Write every row of this SAE as JSON lines; returns their number."""
        from saelab.files import atomic_write_text

        sql = f"SELECT {', '.join(_COLUMNS)} FROM entry WHERE sae = ? ORDER BY time, id"
        rows = self._read(sql, [self.sae_hash]) if self.path.exists() else []
        lines = [json.dumps(dict(zip(_COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
        atomic_write_text(path, "".join(lines))
        return len(lines)

    def merge(self, path: str | Path) -> int:
        """Add the rows of a file that `export` wrote; returns how many are new. Raises `StoreError`, and adds nothing, if a line
        is no such row."""
        rows = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                rows.append(tuple(row[name] for name in _COLUMNS))
                if not isinstance(row["feature"], int) or row["kind"] not in KINDS or not isinstance(row["id"], str):
                    raise ValueError("wrong value")
                if row["value"] is not None:
                    json.loads(row["value"])
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{path}, line {number}, is no annotation ({error}).") from error
        return self._insert(rows)

    def _row(self, feature: int, kind: str, value: Any, name: str, author: str | None) -> tuple[Any, ...]:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is unknown; expected one of {', '.join(KINDS)}.")
        text = None if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False)
        time = datetime.now(UTC).isoformat(timespec="microseconds")
        return (uuid.uuid4().hex, self.sae_hash, int(feature), kind, name, text, author or _author(), time)

    def _insert(self, rows: list[tuple[Any, ...]]) -> int:
        with self._open() as database:
            before = database.total_changes
            database.executemany(f"INSERT OR IGNORE INTO entry VALUES ({', '.join('?' * len(_COLUMNS))})", rows)
            return database.total_changes - before

    def _read(self, sql: str, values: list[Any]) -> list[tuple]:
        with self._open() as database:
            return database.execute(sql, values).fetchall()

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=20)) as database, database:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute(_DDL)
                database.execute(_INDEX)
                yield database
        except sqlite3.Error as error:
            raise StoreError(
                f"{self.path} cannot be used ({error}). It holds what people added to features: restore or move it away."
            ) from error


def _author() -> str:
    with suppress(OSError, KeyError, ImportError):
        return getpass.getuser()
    return "unknown"
