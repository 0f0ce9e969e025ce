"""Writes the files of a feature store into a folder that nobody sees yet; the manifest last."""

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

from saelab.activation_cache.score import ScoreStream
from saelab.errors import SaelabError
from saelab.features import schema
from saelab.features.accumulate import Accumulator
from saelab.features.blob import pack_arrays
from saelab.features.token_text import token_bytes
from saelab.files import atomic_save_safetensors, atomic_write_json, sha256_file

Row = tuple[Any, ...]


def write_store(
    folder: Path,
    manifest: dict[str, Any],
    state: Accumulator,
    logits: dict[str, Tensor] | None,
    cosine: Tensor,
    stream: ScoreStream,
) -> None:
    """Write tokens, database and manifest (completed with format, version and file hashes) into `folder`."""
    ids = torch.cat([batch.ids for batch in stream.batches]).int()
    docs = torch.cat([batch.doc for batch in stream.batches]).int()
    atomic_save_safetensors(folder / schema.TOKENS, {"ids": ids, "doc": docs})
    shown = set(ids.unique().tolist())
    if logits is not None:
        shown |= {int(index) for side in ("positive_ids", "negative_ids") for index in logits[side].unique()}
    texts = token_bytes(stream.lm.tokenizer, sorted(shown))
    tables = [
        ("feature", len(schema.COLUMNS), _feature_rows(state, manifest["n_tokens"], logits, cosine, ids)),
        ("blob", 3, _blob_rows(state, logits)),
        ("token", 2, iter(texts.items())),
    ]
    _write_database(folder / schema.DATABASE, tables)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in (schema.DATABASE, schema.TOKENS)
    }
    head = {"format": schema.FORMAT, "version": schema.VERSION}
    atomic_write_json(folder / schema.MANIFEST, head | manifest | {"files": files})


def _write_database(path: Path, tables: list[tuple[str, int, Iterator[Row]]]) -> None:
    try:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA journal_mode = OFF")  # nobody reads the file before it is whole
            database.execute("PRAGMA synchronous = OFF")
            for statement in schema.DDL:
                database.execute(statement)
            for name, width, rows in tables:
                database.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * width)})", rows)
            for statement in schema.INDEXES:
                database.execute(statement)
            database.commit()
    except sqlite3.OperationalError as error:
        raise SaelabError(
            f"The feature store could not be written ({error}): make room on the disk and repeat the same call."
        ) from error
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _feature_rows(
    state: Accumulator, n_tokens: int, logits: dict[str, Tensor] | None, cosine: Tensor, ids: Tensor
) -> Iterator[Row]:
    """Rows in the order of `schema.COLUMNS`; metrics of a feature that never fired are NULL."""
    n_fired = state.n_fired.double()
    mean = state.total / n_fired
    spread = (state.total_square / n_fired - mean.square()).clamp_min(0).sqrt()
    p99, exact = state.quantile(0.99)
    columns = [
        state.n_fired,
        n_fired / n_tokens,
        mean,
        spread,
        p99,
        state.maximum.double(),
        cosine.double(),
        ids.flatten()[state.top_token[:, 0]],
        torch.full_like(state.n_fired, -1) if logits is None else logits["positive_ids"][:, 0],
        exact.long(),
    ]
    for feature, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        n, density, *values, cos, peak, top, is_exact = row
        fired = n > 0
        metrics = [value if fired else None for value in values]
        yield (feature, n, density, *metrics, cos, peak if fired else None, top if top >= 0 else None, is_exact)


def _blob_rows(state: Accumulator, logits: dict[str, Tensor] | None) -> Iterator[Row]:
    sides = {} if logits is None else {name: tensor.numpy() for name, tensor in logits.items()}
    value, token, doc = state.top_value.numpy(), state.top_token.numpy(), state.top_doc.numpy()
    window, histogram = state.top_window.numpy(), state.histogram.numpy()
    n_fired = state.n_fired.tolist()
    for feature in range(state.d_sae):
        if n_fired[feature]:
            here = np.isfinite(value[feature])
            examples = {
                "value": value[feature][here],
                "document": doc[feature][here].astype("<i4"),
                "sequence": (token[feature][here] // state.ctx_len).astype("<i4"),
                "position": (token[feature][here] % state.ctx_len).astype("<i4"),
                "window": window[feature][here],
            }
            filled = np.flatnonzero(histogram[feature])
            counts = histogram[feature][filled[0] : filled[-1] + 1]
            bins = {"first": np.array([filled[0]], dtype="<i4"), "counts": counts.astype("<i8")}
            yield feature, "examples", pack_arrays(examples)
            yield feature, "histogram", pack_arrays(bins)
        if sides:
            yield feature, "logits", pack_arrays({name: _compact(array[feature]) for name, array in sides.items()})


def _compact(array: np.ndarray) -> np.ndarray:
    return array.astype("<i4" if array.dtype.kind == "i" else "<f4")
