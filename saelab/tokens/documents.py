"""Documents: texts, or their token ids. A document's id, and whether it is held out, depend only on its content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

Document = str | list[int]

SPLITS = {
    "train": "the nine tenths of the documents with sha256(text) % 10 != 0",
    "held_out": "the tenth of the documents with sha256(text) % 10 == 0",
    "all": "all documents",
}
_LARGEST_ID = 2**32 - 1


def document_id(document: Document) -> int:
    """A document's id in every file: the first 8 bytes of its SHA-256 as a signed, big-endian int64."""
    return int.from_bytes(_digest(document)[:8], "big", signed=True)


def is_held_out(document: Document) -> bool:
    """Whether the document belongs to the held-out tenth: its SHA-256, as a number, modulo 10 is 0."""
    return int.from_bytes(_digest(document), "big") % 10 == 0


def _digest(document: Document) -> bytes:
    return hashlib.sha256(document_bytes(document)).digest()


def document_bytes(document: Document) -> bytes:
    """The bytes of a document that are hashed: a text's UTF-8, or its ids as little-endian uint32."""
    if isinstance(document, str):
        # Strict UTF-8 refuses a lone surrogate, which must not stop a harvest: it is encoded as is.
        return document.encode("utf-8", "surrogatepass")
    return np.asarray(document, dtype="<u4").tobytes()


def check_split(split: str) -> None:
    """Raise `ValueError` unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist; use one of {', '.join(map(repr, SPLITS))}.")


def is_table(given: Any) -> bool:
    """Whether it is a data frame or a dataset, which as a list would yield the names of its columns or rows of dicts."""
    return hasattr(given, "columns") or hasattr(given, "column_names")


def whole_numbers(value: Any) -> list[int] | None:
    """The integers of a one-dimensional list, tuple, array or tensor, as a list; None for anything else."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(value, list | tuple | np.ndarray):
        return None
    if not isinstance(value, np.ndarray) and not all(
        isinstance(one, int | np.integer) and not isinstance(one, bool) for one in value
    ):
        return None
    array = np.asarray(value)
    return array.tolist() if array.ndim == 1 and (not len(array) or array.dtype.kind in "iu") else None


def token_ids(value: Any, where: str = "") -> list[int] | None:
    """`whole_numbers`, checked to be token ids. Raises `ValueError` for a negative number or one of more than 32 bits."""
    ids = whole_numbers(value)
    if ids and not 0 <= min(ids) <= max(ids) <= _LARGEST_ID:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"{where}{wrong} is not a token id: ids are from 0 to {_LARGEST_ID:,}.")
    return ids


def zero_or_one(mask: Any) -> list[int] | None:
    """A mask's entries as 0 and 1, from integers or bools; None for anything else."""
    listed = mask.tolist() if isinstance(mask, np.ndarray | Tensor) else mask
    if not isinstance(listed, list | tuple):
        return None
    numbers = whole_numbers([int(one) if isinstance(one, bool) else one for one in listed])
    return numbers if numbers is not None and set(numbers) <= {0, 1} else None


def column_value(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The value of a row in `column`; of token ids, only those that the row's `attention_mask`, if any, does not hide.

    Raises `ValueError`, naming `where`, for a row without the column, a mask that does not fit, and as `token_ids` does.
    """
    if column not in row:
        held = ", ".join(map(str, row)) or "none"
        raise ValueError(
            f"{where} has no column {column!r}; its columns are {held}. Name one (--column), or fix the row."
        )
    value = row[column]
    if column == "input_ids" and isinstance(value, str):
        raise ValueError(
            f"{where}: input_ids holds the text {value[:40]!r}, not token ids: a CSV file cannot hold lists, so write Parquet or "
            "jsonl, or give the column of texts another name."
        )
    ids = token_ids(value, f"{where}: ")
    mask = row.get("attention_mask")
    if ids is None or mask is None or column == "attention_mask":
        return value if ids is None else ids
    kept = zero_or_one(mask)
    if kept is None or len(kept) != len(ids):
        raise ValueError(
            f"{where}: attention_mask holds {repr(mask)[:60]}, not one 0 or 1 for each of {len(ids)} token ids."
        )
    return [token for token, real in zip(ids, kept, strict=True) if real]
