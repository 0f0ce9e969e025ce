"""Rows of text or token ids, and how to read them from containers in memory: columns, data frames, datasets, lists.

Anything else is refused by type, because nearly every Python object is iterable and would yield something.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

Row = dict[str, Any]
_GIVE = (
    "Give a list of strings or of token-id lists, a dict of columns, a DataFrame, a datasets.Dataset, a file, or the id "
    "of a Hugging Face dataset"
)


@dataclass(frozen=True)
class Source:
    """Rows that can be read repeatedly: `rows(columns)` starts over; `columns=None` reads all columns."""

    name: str
    spec: dict[str, Any]
    column: str
    rows: Callable[[list[str] | None], Iterator[Row]]
    content_hash: Callable[[], str]
    tokenizer_hash: str | None = None
    """Hash of the tokenizer that produced the token ids, if the file records it."""


class Rows(NamedTuple):
    """Rows that can be read repeatedly: `read(columns)` yields at least these columns, all of them if None."""

    read: Callable[[list[str] | None], Iterator[Row]]
    n: int
    kind: str
    """What the rows are, in the plural, for messages."""


def rows_of(source: Any, column: str, split: str | None) -> Rows:
    """The rows of a container in memory; items that are not rows become rows with the one column `column`.

    `split` chooses one of a `DatasetDict`. Raises `ValueError` naming what it got and the fix.
    """
    name = f"{type(source).__module__}.{type(source).__qualname__}".removeprefix("builtins.")
    if _is_dataset(source):
        plain = source.with_format(None)
        return Rows(
            lambda some: iter(plain if some is None else plain.select_columns(some)), len(plain), "rows of a Dataset"
        )
    if name.startswith("datasets.") and name.endswith("IterableDataset"):
        raise ValueError(
            "An IterableDataset cannot be identified by its content: give load_texts the dataset's id, which it streams "
            "from a fixed commit, or a Dataset."
        )
    if isinstance(source, Mapping):
        return _of_mapping(source, split)
    if hasattr(source, "__arrow_c_stream__") and (hasattr(source, "columns") or hasattr(source, "column_names")):
        return _of_table(source, name)
    if isinstance(source, Tensor | np.ndarray) and source.ndim != (1 if _holds_objects(source) else 2):
        raise ValueError(f"Got a {name} of shape {tuple(source.shape)}: token ids must be (n_documents, n_tokens).")
    if isinstance(source, io.IOBase):
        raise ValueError(f"Got an open file ({getattr(source, 'name', name)}): give its path.")
    if isinstance(source, bytes | bytearray | memoryview | Set) or not isinstance(source, Iterable):
        why = "has no order" if isinstance(source, Set) else "is not a list of documents"
        raise ValueError(f"Got {name}, which {why}. {_GIVE}.")
    return _of_items(list(source), column)  # a generator can be read once only


def choose_split(splits: Iterable[str], split: str | None) -> str:
    """The split to read: the one requested, or the only one. Raises `ValueError` naming those available."""
    names = list(splits)
    if split is None and len(names) == 1:
        return names[0]
    if split not in names:
        asked = "" if split is None else f", not {split!r}"
        raise ValueError(
            f"It holds the splits {', '.join(map(repr, names))}{asked}: choose one, e.g. hub_split={names[0]!r}."
        )
    return split


def _holds_objects(array: Tensor | np.ndarray) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "UTO"


def _is_dataset(source: Any) -> bool:
    return type(source).__module__ == "datasets.arrow_dataset" and hasattr(source, "with_format")


def _of_mapping(source: Mapping[str, Any], split: str | None) -> Rows:
    if source and all(_is_dataset(value) for value in source.values()):
        return rows_of(source[choose_split(source, split)], "", None)
    columns: dict[str, list[Any]] = {}
    for name, values in source.items():
        if (
            isinstance(values, str | bytes | Mapping | Set)
            or not isinstance(values, Iterable)
            or getattr(values, "ndim", 1) == 0
        ):
            raise ValueError(
                f"Got a dict whose {name!r} is {repr(values)[:60]} ({type(values).__name__}): a dict of columns needs a "
                "list for each."
            )
        columns[str(name)] = list(values)
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1:
        said = f"columns of unequal length ({lengths})" if lengths else "no columns"
        raise ValueError(f"Got a dict of {said}: each column needs one value per row.")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return Rows(lambda _: iter(rows), len(rows), "rows in memory")


def _of_table(source: Any, name: str) -> Rows:
    """A data frame of any library that can export itself as an Arrow table."""
    import pyarrow

    try:
        table = pyarrow.table(source)
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise ValueError(
            f"A column of the {name} has mixed types ({str(error)[:200]}): pass only the column of texts."
        ) from error
    return Rows(
        lambda _: (row for batch in table.to_batches(max_chunksize=256) for row in batch.to_pylist()),
        table.num_rows,
        "rows of a table",
    )


def _of_items(items: list[Any], column: str) -> Rows:
    rows = [item for item in items if isinstance(item, Mapping)]
    if rows and len(rows) == len(items):
        if all({"role", "content"} <= row.keys() for row in rows):
            raise ValueError("Got one conversation: give a list of conversations, each a list of messages.")
        return Rows(lambda _: (dict(row) for row in rows), len(rows), "rows in memory")
    if items and all(isinstance(item, int | np.integer) for item in items):
        raise ValueError(
            f"Got a flat list of {len(items)} numbers: give a list of documents, each a list of token ids."
        )
    kind = "strings in memory" if all(isinstance(item, str) for item in items) else "documents in memory"
    return Rows(lambda _: ({column: item} for item in items), len(items), kind)


def known_column(rows: Callable[[None], Iterator[Row]], column: str) -> str:
    """`column`, or "input_ids" if "text" was requested and the rows hold only ids."""
    first = next(rows(None), {}) if column == "text" else {}
    return "input_ids" if "text" not in first and "input_ids" in first else column
