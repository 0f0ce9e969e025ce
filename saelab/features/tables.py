"""A feature store as two tables for other tools: one row a feature, one row an example; as Parquet, or as CSV for spreadsheets.

Both files are there or none: they are written in a folder beside, which is renamed at the end.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from saelab.errors import SaelabError
from saelab.features import schema
from saelab.features.feature import EXAMPLE_KINDS, Feature
from saelab.features.plain import rows_data, store_data
from saelab.features.records import Example
from saelab.features.steer_scores import STEER_SCORE
from saelab.files import fsync_dir, remove_leftovers, temporary_path, writing

FEATURES, EXAMPLES = "features", "examples"
"""Names of the files, before their suffix."""
FORMATS = ("parquet", "csv")
_BATCH = 256
_INTEGERS = ("feature", "n_fired", "p99_exact", "position", "sign")
_TEXTS = ("label", "label_by", "words_label", "peak", "top_promoted", "scores")
_OTHER = tuple(f"other_{name}" for name in schema.END_COLUMNS)
_FORMULA = tuple("=+-@\t\r")


def save_tables(
    store: Any,
    folder: str | Path,
    *,
    format: str = "parquet",
    kinds: Sequence[str] | None = None,
    progress: bool = True,
) -> list[Path]:
    """Write features.parquet and examples.parquet (or .csv) into a new or empty folder; returns the files.

    `features` has the columns of `schema.COLUMNS` and `LABEL_COLUMNS`, with tokens as text ("peak", "top_promoted"); "label",
    the one that counts, and "label_by" ("hand", "model" or "words"); "steer_score"; "lists"; "scores" as JSON; the metrics of the
    other end of a signed feature ("other_..."). `examples` has a row for each example of the `kinds` (by default all that the
    store holds), with its tokens, their activations and the text. Every cell of a CSV that a spreadsheet would take for a formula
    begins with an apostrophe. Raises `ValueError` for another format or kind, `SaelabError` for a folder that holds files.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; expected one of {', '.join(FORMATS)}.")
    kinds = _known_kinds(store) if kinds is None else tuple(kinds)
    if unknown := set(kinds) - set(EXAMPLE_KINDS):
        raise ValueError(f"kinds={sorted(unknown)} are unknown; expected some of {', '.join(EXAMPLE_KINDS)}.")
    folder, write = Path(folder), _write_parquet if format == "parquet" else _write_csv
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SaelabError(f"{folder} holds something already: choose a new or empty folder for the tables.")
    temporary, names = temporary_path(folder), [f"{name}.{format}" for name in (FEATURES, EXAMPLES)]
    with writing(folder), ExitStack() as stack:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent, folder.name)
        temporary.mkdir()
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        write(store, temporary / names[0], FEATURES, feature_rows(store, progress))
        write(store, temporary / names[1], EXAMPLES, example_rows(store, kinds, progress))
        fsync_dir(temporary)
        temporary.replace(folder)  # an empty folder is replaced
        fsync_dir(folder.parent)
    return [folder / name for name in names]


def _known_kinds(store: Any) -> tuple[str, ...]:
    """A store of an earlier version holds the strongest examples alone, of both ends if it kept them apart."""
    if store.manifest["version"] >= 3:
        return EXAMPLE_KINDS
    return ("top",) if store.signed is None else ("top", "bottom")


def feature_rows(store: Any, progress: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of the first table."""
    notes = store.annotations
    by_hand = {entry.feature for entry in notes.latest("label")}
    by_model = {entry.feature for entry in notes.latest("model_label")}
    lists, scores = _members(store), _scores(store)
    for rows in _pages(store, FEATURES, progress):
        others = {row["feature"]: (store.ends(row["feature"]) if store.signed else [])[1:] for row in rows}
        for row, words in zip(rows_data(store, rows), (row["label"] for row in rows), strict=True):
            i = row["feature"]
            by = "hand" if i in by_hand else "model" if i in by_model else "words" if words is not None else None
            other = {f"other_{name}": value for end in others[i] for name, value in end.items()}
            yield row | other | {
                "label_by": by,
                "words_label": words,
                "lists": lists.get(i, []),
                "scores": json.dumps(scores[i]) if i in scores else None,
            }  # fmt: skip


def example_rows(store: Any, kinds: Sequence[str], progress: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of the second table, by feature, kind and rank."""
    for row in (row for page in _pages(store, EXAMPLES, progress) for row in page):
        feature = Feature(store, row)
        for kind in kinds:
            for rank, example in enumerate(feature.examples(kind=kind)):
                yield {"feature": row["feature"], "kind": kind, "rank": rank, **_example(example)}


def _example(example: Example) -> dict[str, Any]:
    low, high = example.quantile or (None, None)
    context, position = example.where
    return {
        "value": example.value,
        "document": example.document,
        "document_position": example.document_position,
        "context": context,
        "position": position,
        "quantile_low": low,
        "quantile_high": high,
        "peak": example.peak,
        "token_ids": list(example.token_ids),
        "values": list(example.values),
        "text": example.text,
    }


def _pages(store: Any, name: str, progress: bool) -> Iterator[list[dict[str, Any]]]:
    with tqdm(total=store.d_sae, desc=f"Writing {name}", unit="feature", disable=not progress) as bar:
        for first in range(0, store.d_sae, _BATCH):
            yield (page := store.table("feature", False, limit=_BATCH, offset=first))
            bar.update(len(page))


def _members(store: Any) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, features in sorted(store.lists.items()):
        for feature in features:
            found.setdefault(feature, []).append(name)
    return found


def _scores(store: Any) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for kind in ("score", "steer", "effect"):
        for entry in store.annotations.latest(kind):
            found.setdefault(entry.feature, {})[entry.name or kind] = entry.value
    return found


def _columns(table: str) -> dict[str, str]:
    """Names and types of the columns of a table."""
    if table == EXAMPLES:
        integers = dict.fromkeys(("document", "document_position", "context", "position"), "int64")
        floats = dict.fromkeys(("quantile_low", "quantile_high"), "float64")
        first = {"feature": "int64", "kind": "string", "rank": "int64", "value": "float64"}
        return first | integers | floats | {"peak": "int64", "token_ids": "ints", "values": "floats", "text": "string"}
    named = [name for name in (*schema.COLUMNS, *schema.LABEL_COLUMNS) if name not in ("peak_token", "top_logit")]
    names = [
        "feature",
        "label",
        "label_by",
        *named[1:],
        "sign",
        STEER_SCORE,
        "words_label",
        "peak",
        "top_promoted",
        "lists",
        "scores",
        *_OTHER,
    ]
    types = dict.fromkeys(_TEXTS, "string") | {"lists": "strings"}
    types |= {name: "int64" for name in names if name.removeprefix("other_") in _INTEGERS}
    return {name: types.get(name, "float64") for name in dict.fromkeys(names)}


def _write_parquet(store: Any, path: Path, table: str, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    lists = {"ints": pyarrow.int64(), "floats": pyarrow.float32(), "strings": pyarrow.string()}
    types = {name: pyarrow.list_(one) for name, one in lists.items()}
    types |= {"int64": pyarrow.int64(), "float64": pyarrow.float64(), "string": pyarrow.string()}
    fields = [(name, types[kind]) for name, kind in _columns(table).items()]
    about = {"saelab": json.dumps(store_data(store))}
    layout = pyarrow.schema(fields, metadata=about)
    with pyarrow.parquet.ParquetWriter(path, layout, compression="zstd") as writer:
        while chunk := list(islice(rows, 4096)):
            writer.write_table(pyarrow.Table.from_pylist(chunk, schema=layout))


def _write_csv(_: Any, path: Path, table: str, rows: Iterator[dict[str, Any]]) -> None:
    names = list(_columns(table))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([_cell(row.get(name)) for name in names] for row in rows)


def _cell(value: Any) -> Any:
    """A value in a CSV: lists as JSON, text so that no spreadsheet runs it."""
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
