"""Writes the files of a feature store into a hidden build folder; the manifest last."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.errors import SaelabError
from saelab.evaluation.heldout import ScoreStream
from saelab.features import schema
from saelab.features.accumulate import Accumulator
from saelab.features.blob import pack_arrays
from saelab.features.signed import SignedAccumulator
from saelab.features.token_text import token_bytes
from saelab.files import atomic_save_safetensors, atomic_write_json, sha256_file

Row = tuple[Any, ...]


def write_store(
    folder: Path,
    manifest: dict[str, Any],
    state: SignedAccumulator,
    logits: dict[str, Tensor] | None,
    cosine: Tensor,
    stream: ScoreStream,
) -> None:
    """Write tokens, database and manifest (with format, version and file hashes added) into `folder`. Raises `SaelabError` when
    the database cannot be written."""
    ids = torch.cat([batch.ids for batch in stream.batches]).int()
    docs = torch.cat([batch.doc for batch in stream.batches]).int()
    atomic_save_safetensors(folder / schema.TOKENS, {"ids": ids, "doc": docs})
    shown = set(ids.unique().tolist())
    if logits is not None:
        shown |= {int(index) for side in ("positive_ids", "negative_ids") for index in logits[side].unique()}
    texts = token_bytes(stream.lm.tokenizer, sorted(shown))
    signed = state.negative is not None
    tables = [
        ("feature", len(schema.COLUMNS) + signed, _feature_rows(state, manifest["n_tokens"], logits, cosine, ids)),
        ("blob", 3, _blob_rows(state, logits)),
        ("token", 2, iter(texts.items())),
    ]
    if signed:
        tables.append(("feature_end", 1 + len(schema.END_COLUMNS), _end_rows(state)))
    _write_database(folder / schema.DATABASE, schema.DDL + (schema.SIGNED_DDL if signed else []), tables)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in (schema.DATABASE, schema.TOKENS)
    }
    head = {"format": schema.FORMAT, "version": schema.VERSION if signed else schema.UNSIGNED_VERSION}
    atomic_write_json(folder / schema.MANIFEST, head | manifest | {"files": files})


def _write_database(path: Path, ddl: list[str], tables: list[tuple[str, int, Iterator[Row]]]) -> None:
    try:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA journal_mode = OFF")  # no reader opens the file before it is complete
            database.execute("PRAGMA synchronous = OFF")
            for statement in ddl:
                database.execute(statement)
            for name, width, rows in tables:
                database.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * width)})", rows)
            for statement in schema.INDEXES:
                database.execute(statement)
            database.commit()
    except sqlite3.OperationalError as error:
        raise SaelabError(
            f"The feature store could not be written ({error}): free disk space and repeat the same call."
        ) from error
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _feature_rows(
    state: SignedAccumulator, n_tokens: int, logits: dict[str, Tensor] | None, cosine: Tensor, ids: Tensor
) -> Iterator[Row]:
    """Rows in the order of `schema.COLUMNS` (and "sign"); metrics of a feature that never fired are NULL."""
    ends = [_metrics(end) + [ids.flatten()[end.top_token[:, 0]]] for end in state.ends.values()]
    below, last = state.sign < 0, len(ends) - 1
    _, mean, spread, p99, largest, exact, peak = (
        torch.where(below, ends[last][i], column) for i, column in enumerate(ends[0])
    )
    top = torch.full_like(state.sign, -1)
    if logits is not None:
        top = torch.where(below, logits["negative_ids"][:, 0], logits["positive_ids"][:, 0])
    columns = [
        state.n_fired, state.n_fired.double() / n_tokens, mean, spread, p99, largest, cosine.double(), peak, top, exact,
        *([state.sign] if last else []),
    ]  # fmt: skip
    for feature, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        n, density, *values, cos, peak_token, top_token, is_exact = row[:10]
        fired = n > 0
        metrics = [value if fired else None for value in values]
        sign = [value if fired else None for value in row[10:]]
        peak_token = peak_token if fired else None
        yield (feature, n, density, *metrics, cos, peak_token, top_token if top_token >= 0 else None, is_exact, *sign)


def _metrics(end: Accumulator) -> list[Tensor]:
    """`schema.END_COLUMNS` without the sign, each `(d_sae,)`."""
    n_fired = end.n_fired.double()
    mean = end.total / n_fired
    spread = (end.total_square / n_fired - mean.square()).clamp_min(0).sqrt()
    p99, exact = end.quantile(0.99)
    return [end.n_fired, mean, spread, p99, end.maximum.double(), exact.long()]


def _end_rows(state: SignedAccumulator) -> Iterator[Row]:
    for sign, end in state.ends.items():
        for feature, row in enumerate(zip(*(column.tolist() for column in _metrics(end)), strict=True)):
            if row[0]:
                yield feature, sign, *row


def _blob_rows(state: SignedAccumulator, logits: dict[str, Tensor] | None) -> Iterator[Row]:
    sides = {} if logits is None else {name: tensor.numpy() for name, tensor in logits.items()}
    for feature in range(state.d_sae):
        for sign, end in state.ends.items():
            if end.n_fired[feature]:
                yield from _end_blobs(feature, sign, end)
        if sides:
            yield feature, "logits", pack_arrays({name: _compact(array[feature]) for name, array in sides.items()})


def _end_blobs(feature: int, sign: int, end: Accumulator) -> Iterator[Row]:
    """Examples, with their signed values, and the histogram of magnitudes."""
    value, token = end.top_value[feature].numpy(), end.top_token[feature].numpy()
    here = np.isfinite(value)
    examples = {
        "value": sign * value[here],
        "document": end.top_doc[feature].numpy()[here].astype("<i4"),
        "sequence": (token[here] // end.ctx_len).astype("<i4"),
        "position": (token[here] % end.ctx_len).astype("<i4"),
        "window": end.top_window[feature].numpy()[here],
    }
    histogram = end.histogram[feature].numpy()
    filled = np.flatnonzero(histogram)
    counts = histogram[filled[0] : filled[-1] + 1]
    bins = {"first": np.array([filled[0]], dtype="<i4"), "counts": counts.astype("<i8")}
    yield feature, schema.blob_kind("examples", sign), pack_arrays(examples)
    yield feature, schema.blob_kind("histogram", sign), pack_arrays(bins)


def _compact(array: np.ndarray) -> np.ndarray:
    return array.astype("<i4" if array.dtype.kind == "i" else "<f4")
