"""Rows of text or token ids from files, saved datasets and memory. The entry point is `tokens.load_texts`."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from saelab.files import sha256_file
from saelab.tokens.containers import Row, Rows, Source, known_column, rows_of
from saelab.tokens.documents import column_value, document_bytes
from saelab.tokens.hf_datasets import is_saved, open_saved

BUILT_IN = {"demo": "corpus.parquet", "concepts": "concepts.parquet"}
TXT_DOCUMENT_CHARACTERS = 2_000
TXT_LONGEST_CHARACTERS = 8_000
_UTF8 = "utf-8-sig"  # with or without a byte order mark


def open_source(source: Any, column: str, split: str | None, open_hub: Callable[[str], Source]) -> Source:
    """Detect what `source` is and open it, a dataset id with `open_hub`; `split` chooses one of several splits.

    Raises `ValueError` naming the source and the fix.
    """
    if isinstance(source, str) and source in BUILT_IN:
        return _built_in(source, column)
    if isinstance(source, Path) or (isinstance(source, str) and _is_file_name(source)):
        return _file(Path(source), column, split)
    if isinstance(source, str):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
            raise ValueError(
                f"{source[:80]!r} is neither a file here nor a Hugging Face dataset id. Give one of these, "
                f"or 'demo', 'concepts'; to use it as the text itself, put it in a list."
            )
        return open_hub(source)
    return _memory(rows_of(source, column, split), column)


def open_named(source: str, column: str, split: str | None = None) -> Source:
    """Open a built-in corpus, a file or a saved dataset, as named in a `spec`."""
    return _built_in(source, column) if source in BUILT_IN else _file(Path(source), column, split)


def _is_file_name(source: str) -> bool:
    return Path(source).suffix.lower() in _READERS or Path(source).exists()


def _built_in(name: str, column: str) -> Source:
    # Editable installs, wheels and checkouts all keep package data as plain files.
    path = Path(str(resources.files("saelab") / "data" / BUILT_IN[name]))
    return Source(
        name, {"source": name, "column": column}, column, lambda c: _parquet(path, c), lambda: sha256_file(path)
    )


def _file(path: Path, column: str, split: str | None) -> Source:
    if is_saved(path):
        return open_saved(path.resolve(), column, split)
    if not path.exists():
        raise ValueError(f"{str(path)!r} does not exist: give the path of a text file, or a Hugging Face dataset id.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None or path.is_dir():
        what = "a folder" if path.is_dir() else f"a {path.suffix or 'suffixless'} file"
        raise ValueError(
            f"{str(path)!r} is {what}; texts are read from {', '.join(_READERS)} files and folders of Dataset.save_to_disk."
        )
    path = path.resolve()
    rows = lambda columns: _utf8(reader, path, columns)  # noqa: E731
    column = "text" if path.suffix.lower() == ".txt" else known_column(rows, column)
    spec = {"source": str(path), "column": column}
    return Source(path.name, spec, column, rows, lambda: sha256_file(path), _made_by(path))


def _made_by(path: Path) -> str | None:
    """`tokenizer_hash` from the metadata of a Parquet file, if it has one."""
    import pyarrow
    import pyarrow.parquet

    if path.suffix.lower() != ".parquet":
        return None
    try:
        found = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"tokenizer_hash")
    except pyarrow.ArrowInvalid:
        return None  # the reader raises the error that names it
    return None if found is None else found.decode()


def _utf8(reader: Callable[..., Iterator[Row]], path: Path, columns: list[str] | None) -> Iterator[Row]:
    try:
        yield from reader(path, columns)
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text ({error}): save it as UTF-8.") from error


def without_lone_surrogates(text: str) -> str:
    """`text` as a tokenizer accepts it: lone surrogates, which UTF-8 cannot encode, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet(path: Path, columns: list[str] | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{str(path)!r} is not a Parquet file ({error}).") from error
    with file:
        batches = file.iter_batches(batch_size=256, columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(f"{str(path)!r} is damaged ({error}): write it again.") from error
            if batch is None:
                return
            yield from batch.to_pylist()


def _jsonl(path: Path, columns: list[str] | None) -> Iterator[Row]:
    with path.open(encoding=_UTF8) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also too many digits, or brackets nested too deeply
                raise ValueError(
                    f"{str(path)!r} line {number} is not JSON ({error}): give one object per line."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{str(path)!r} line {number} holds a {type(row).__name__}, not an object {{...}}.")
            yield row


def _csv(path: Path, columns: list[str] | None) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses documents over 128 KB
    with path.open(encoding=_UTF8, newline="") as file:
        yield from csv.DictReader(file)


def _txt(path: Path, columns: list[str] | None) -> Iterator[Row]:
    lines: list[str] = []
    characters = 0
    with path.open(encoding=_UTF8) as file:
        for line in file:
            lines.append(line)
            characters += len(line)
            at_blank_line = not line.strip() and characters >= TXT_DOCUMENT_CHARACTERS
            if at_blank_line or characters >= TXT_LONGEST_CHARACTERS:
                yield {"text": "".join(lines).strip()}
                lines, characters = [], 0
    yield {"text": "".join(lines).strip()}


_READERS: dict[str, Callable[[Path, list[str] | None], Iterator[Row]]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".txt": _txt,
}


def _memory(rows: Rows, column: str) -> Source:
    """Rows in memory, which cannot be reopened: identified by the SHA-256 of their documents."""
    name = f"{rows.n} {rows.kind if rows.n != 1 else rows.kind.replace('s ', ' ', 1)}"
    column, digest = known_column(rows.read, column), hashlib.sha256()
    for number, row in enumerate(rows.read(None)):
        value = column_value(row, column, f"row {number} of {name}")
        ids = b"\xff" if isinstance(value, list) and value and isinstance(value[0], int) else b""  # not valid in UTF-8
        content = ids + document_bytes(value if ids or isinstance(value, str) else json.dumps(value, default=repr))
        digest.update(len(content).to_bytes(8, "big") + content)
    spec = {"source": "strings", "sha256": digest.hexdigest(), "column": column, "n": rows.n}
    return Source(name, spec, column, rows.read, digest.hexdigest)
