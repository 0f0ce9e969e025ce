"""The rows of a benchmark on disk: `STEM.json` and `STEM.csv` are rewritten after each row, so a benchmark that is killed
loses only the current row, and the same call resumes there."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saelab.errors import SaelabError
from saelab.files import atomic_write_json, atomic_write_text, locked, read_json
from saelab.identity import ANY, differences, refusal
from saelab.saes.step import RULES

Row = dict[str, Any]
Order = Callable[[Row], Any]

# Values of settings that earlier versions did not store: the first trained by rules 1, and its model is unknown.
_ABSENT = {"rules": 1, "rows_of": ANY, "model": ANY, "eval_tokens_ce": 4096}


class Rows:
    """The rows of a benchmark. `settings` are shared by all rows; `keys` name the columns that identify a row; `order` is the
    sort key of the rows (None: order of insertion). Raises `SaelabError` for another kind of file, or other settings."""

    def __init__(
        self,
        folder: Path | None,
        settings: Mapping[str, Any],
        keys: Sequence[str],
        stem: str = "rows",
        order: Order | None = None,
    ) -> None:
        self.folder, self.settings, self.keys = folder, {**settings, "rules": RULES}, tuple(keys)
        self.stem, self.order = stem, order
        self.rows: list[Row] = []
        if folder is not None and (folder / f"{stem}.json").exists():
            self.rows = self._read(folder / f"{stem}.json")

    def _read(self, path: Path) -> list[Row]:
        saved = read_json(path)
        if not isinstance(saved, dict) or not isinstance(saved.get("rows"), list):
            raise SaelabError(f"{path} was not written by a benchmark. Move it away, or choose another --out-dir.")
        different = differences(saved.get("settings") or {}, self.settings, _ABSENT)
        if different:
            raise SaelabError(refusal(path.parent, "benchmark", different, "choose another --out-dir"))
        return saved["rows"]

    def find(self, **key: Any) -> Row | None:
        """The finished row with this key, or None."""
        return next((row for row in self.rows if self._key(row) == self._key(key)), None)

    def get(self, compute: Callable[[], Mapping[str, Any]], **key: Any) -> Row:
        """The row with this key: the stored one if it is finished, else computed and stored."""
        row = self.find(**key)
        if row is None:
            row = {**key, **compute()}
            self.rows.append(row)
            if self.order is not None:
                self.rows.sort(key=self.order)
            self._write()
        return row

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.keys)

    def _write(self) -> None:
        if self.folder is not None:
            atomic_write_json(self.folder / f"{self.stem}.json", {"settings": self.settings, "rows": self.rows})
            atomic_write_text(self.folder / f"{self.stem}.csv", to_csv(self.rows))


@contextmanager
def open_rows(
    folder: str | Path | None,
    settings: Mapping[str, Any],
    keys: Sequence[str],
    stem: str = "rows",
    order: Order | None = None,
) -> Iterator[Rows]:
    """The rows of a benchmark in `folder` (None: in memory only), locked against other processes (`SaelabError`)."""
    if folder is None:
        yield Rows(None, settings, keys, order=order)
        return
    folder = Path(folder)
    with locked(
        folder, f"Another process is running the benchmark in {folder}. Wait for it, or choose another --out-dir."
    ):
        yield Rows(folder, settings, keys, stem, order)


def to_csv(rows: Sequence[Row]) -> str:
    """CSV text with one line per row and the union of their columns, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Mean over seeds and, with two or more, the standard deviation: "0.123 ± 0.004"; "-" without values."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean
