"""Writes the files of a feature store; the manifest last, so that a store is complete once it can be seen."""

from __future__ import annotations

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
from saelab.features.blob import pack_arrays
from saelab.features.collecting.accumulate import Accumulator
from saelab.features.collecting.collector import Collector
from saelab.features.collecting.document_positions import document_positions
from saelab.features.collecting.feature_words import FeatureWords
from saelab.features.collecting.kept import Examples
from saelab.features.collecting.signed import SignedAccumulator
from saelab.features.collecting.token_sample import TokenSample
from saelab.features.collecting.words import Words
from saelab.features.token_text import token_bytes
from saelab.files import atomic_path, atomic_save_safetensors, atomic_write_json, sha256_file
from saelab.kernels.sparse_acts import offsets_of

Row = tuple[Any, ...]


def write_store(
    folder: Path,
    manifest: dict[str, Any],
    state: Collector,
    logits: dict[str, Tensor] | None,
    cosine: Tensor,
    stream: ScoreStream,
) -> None:
    """Write tokens, sample, database and manifest (with format, version and file hashes added) into `folder`. Raises
    `SaelabError` when the database cannot be written."""
    ids = torch.cat([batch.ids for batch in stream.batches]).int()
    docs = torch.cat([batch.doc for batch in stream.batches]).int()
    atomic_save_safetensors(folder / schema.TOKENS, {"ids": ids, "doc": docs})
    atomic_save_safetensors(folder / schema.SAMPLE, _sample(state.sample, state.d_sae))
    shown = set(ids.unique().tolist())
    if logits is not None:
        shown |= {int(index) for name, column in logits.items() if name.endswith("_ids") for index in column.unique()}
    texts = token_bytes(stream.lm.tokenizer, sorted(shown))
    words = FeatureWords(state.ends, Words(ids.numpy(), texts))
    document_position = document_positions(docs.numpy(), len(stream.start))
    signed = state.ends.negative is not None
    n_columns = len(schema.COLUMNS) + len(schema.LABEL_COLUMNS) + signed
    tables = [
        ("feature", n_columns, _feature_rows(state.ends, manifest["n_tokens"], logits, cosine, ids, words)),
        ("blob", 3, _blob_rows(state, logits, document_position)),
        ("token", 3, ((index, text, _word(text)) for index, text in texts.items())),
        ("peak", 5, words.peak_rows()),
        ("words (rowid, label, peaks, context)", 4, words.search_rows()),
    ]
    if signed:
        tables.append(("feature_end", 1 + len(schema.END_COLUMNS), _end_rows(state.ends)))
    _write_database(folder / schema.DATABASE, schema.DDL + (schema.SIGNED_DDL if signed else []), tables)
    names = (schema.DATABASE, schema.TOKENS, schema.SAMPLE)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}
    head = {"format": schema.FORMAT, "version": schema.VERSION}
    atomic_write_json(folder / schema.MANIFEST, head | manifest | {"files": files})


def _word(piece: bytes) -> str:
    """How a token is searched for: without spaces, in lower case."""
    return piece.decode("utf-8", "replace").strip().casefold()


def _sample(sample: TokenSample, d_sae: int) -> dict[str, Tensor]:
    """The token sample by token, and by feature (`by_feature` are rows of the sample)."""
    tokens, offsets, features = sample.csr()
    rows = torch.repeat_interleave(torch.arange(len(tokens)), offsets.diff())
    order = torch.argsort(features, stable=True)
    counts = torch.bincount(features, minlength=d_sae)
    by_feature = {"by_feature": rows[order].int(), "feature_offsets": offsets_of(counts)}
    return {"tokens": tokens, "offsets": offsets, "features": features, **by_feature}


def _write_database(path: Path, ddl: list[str], tables: list[tuple[str, int, Iterator[Row]]]) -> None:
    try:
        with atomic_path(path) as temporary, closing(sqlite3.connect(temporary)) as database:
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


def _feature_rows(
    state: SignedAccumulator,
    n_tokens: int,
    logits: dict[str, Tensor] | None,
    cosine: Tensor,
    ids: Tensor,
    words: FeatureWords,
) -> Iterator[Row]:
    """Rows in the order of `schema.COLUMNS`, `LABEL_COLUMNS` (and "sign"); metrics of a feature that never fired are NULL."""
    ends = [_metrics(end) + [_peak_tokens(end, ids)] for end in state.ends.values()]
    below, last = state.sign < 0, len(ends) - 1
    _, mean, spread, p99, largest, exact, peak = (
        torch.where(below, ends[last][i], column) for i, column in enumerate(ends[0])
    )
    top = torch.full_like(state.sign, -1)
    if logits is not None:
        top = torch.where(below, logits["negative_ids"][:, 0], logits["positive_ids"][:, 0])
    columns = [
        state.n_fired, state.n_fired.double() / n_tokens, mean, spread, p99, largest, cosine.double(), peak, top, exact,
        state.sign,
    ]  # fmt: skip
    for feature, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        n, density, *values, cos, peak_token, top_token, is_exact, sign = row
        metrics = [value if n > 0 else None for value in (*values, peak_token, sign)]
        label = words.label(feature)
        yield (
            feature, n, density, *metrics[:4], cos, metrics[4], top_token if top_token >= 0 else None, is_exact,
            label.text, label.share, label.sharpness, label.position, *(metrics[5:] if last else []),
        )  # fmt: skip


def _peak_tokens(end: Accumulator, ids: Tensor) -> Tensor:
    """Token id at the largest activation of each feature; any, where there is none."""
    examples, tokens = end.kept["examples"].examples, torch.zeros(end.d_sae, dtype=torch.int64)
    first = torch.ones(len(examples.group), dtype=torch.bool)
    first[1:] = examples.group[1:] != examples.group[:-1]
    tokens[examples.group[first]] = examples.token[first]
    return ids.flatten()[tokens]


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


def _blob_rows(state: Collector, logits: dict[str, Tensor] | None, document_position: np.ndarray) -> Iterator[Row]:
    sides = {} if logits is None else {name: tensor.numpy() for name, tensor in logits.items()}
    for sign, end in state.ends.ends.items():
        for kind, kept in end.kept.items():
            n_groups = kept.n_groups // end.d_sae
            yield from _example_rows(
                schema.blob_kind(kind, sign), kept.examples, n_groups, sign, end.ctx_len, document_position
            )
        for feature in end.n_fired.nonzero().flatten().tolist():
            yield feature, schema.blob_kind("histogram", sign), pack_arrays(_histogram(end.histogram[feature].numpy()))
    yield from _example_rows("near_miss", state.near_misses.examples, 1, 1, state.ctx_len, document_position)
    for feature in range(state.d_sae) if sides else ():
        yield feature, "logits", pack_arrays({name: _compact(array[feature]) for name, array in sides.items()})


def _example_rows(
    kind: str, examples: Examples, n_groups: int, sign: int, ctx_len: int, document_position: np.ndarray
) -> Iterator[Row]:
    """One blob for each feature, whose examples may be of several groups; values at the negative end are negative."""
    features = (examples.group // n_groups).numpy()
    token, windows = examples.token.numpy(), examples.windows.dense().numpy()
    columns = {
        "value": sign * examples.value.numpy(),
        "document": examples.doc.numpy().astype("<i4"),
        "sequence": (token // ctx_len).astype("<i4"),
        "position": (token % ctx_len).astype("<i4"),
        "document_position": document_position[token].astype("<i4"),
        "window": windows,
    }
    starts = np.flatnonzero(np.diff(features, prepend=-1))
    for first, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(features)], strict=True):
        yield int(features[first]), kind, pack_arrays({name: column[first:stop] for name, column in columns.items()})


def _histogram(counts: np.ndarray) -> dict[str, np.ndarray]:
    filled = np.flatnonzero(counts)
    return {
        "first": np.array([filled[0]], dtype="<i4"),
        "counts": counts[filled[0] : filled[-1] + 1].astype("<i8"),
    }


def _compact(array: np.ndarray) -> np.ndarray:
    return array.astype("<i4" if array.dtype.kind == "i" else "<f4")
