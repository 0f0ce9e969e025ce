"""The order of a feature store's table; and the store as Parquet and CSV tables: they hold what it says, whole or not at all,
and run in no spreadsheet."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

import saelab
from saelab.cli.main import main
from saelab.errors import SaelabError
from saelab.features import schema
from saelab.features.feature import EXAMPLE_KINDS
from saelab.features.tables import save_tables


@pytest.fixture
def store(hostile_run, tmp_path):
    return saelab.load_features(
        shutil.copytree(hostile_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache", "features.old"))
    )


def annotate(store) -> None:
    store.annotations.add(3, "label", '=HYPERLINK("http://example.com")')
    store.annotations.add(4, "model_label", "a machine's guess")
    store.annotations.add(4, "score", {"balanced_accuracy": 0.8}, name="detection")
    for name in ("starred", "weather"):
        store.annotations.add(5, "list", True, name=name)


def test_equal_values_are_in_the_order_of_their_index_or_its_reverse(store):
    """Where the index of the column is read, and where the index of a bound is and the rows are sorted."""
    rows, tied = store.table("feature", False, limit=len(store)), set()
    for name in schema.SORTABLE:
        known = [(row[name], row["feature"]) for row in rows if row[name] is not None]
        missing = [row["feature"] for row in rows if row[name] is None]
        tied |= {name} if len(dict(known)) < len(known) else set()
        for descending in (False, True):
            wanted = [index for _, index in sorted(known, reverse=descending)]
            wanted += sorted(missing, reverse=descending)
            for where in ({}, {"cosine": (-2, 2)}):
                table = store.table(name, descending, where, limit=len(store))
                assert [row["feature"] for row in table] == wanted == store.features(name, descending, where), name
    assert {"n_fired", "density"} <= tied


def check_examples(store, examples: list[dict], kinds) -> None:
    """The rows are the stored examples of these kinds, and no others."""
    by_place = {(row["feature"], row["kind"], row["rank"]): row for row in examples}
    assert len(by_place) == len(examples) and {row["kind"] for row in examples} == set(kinds)
    for index in range(0, len(store), 5):
        for kind in EXAMPLE_KINDS:
            found = store.feature(index).examples(kind=kind) if kind in kinds else []
            assert (index, kind, len(found)) not in by_place
            for rank, example in enumerate(found):
                row = by_place[index, kind, rank]
                assert row["value"] == example.value and row["values"] == list(example.values)
                assert tuple(row["token_ids"]) == example.token_ids and row["text"] == example.text
                assert (row["document"], row["context"], row["position"]) == (example.document, *example.where)
                assert (row["quantile_low"], row["quantile_high"]) == (example.quantile or (None, None))


def test_parquet_reads_back_as_the_store(store, tmp_path):
    annotate(store)
    files = store.to_parquet(tmp_path / "out", kinds=["top", "near_miss"])
    assert [path.name for path in files] == ["features.parquet", "examples.parquet"]
    table = pyarrow.parquet.read_table(files[0])
    assert json.loads(table.schema.metadata[b"saelab"])["sae"]["hash"] == store.manifest["sae"]["hash"]
    rows, examples = table.to_pylist(), pyarrow.parquet.read_table(files[1]).to_pylist()
    assert [row["feature"] for row in rows] == list(range(len(store)))
    labels, known = store.labels, {row["feature"]: row for row in store.table("feature", limit=len(store))}
    for row in rows:
        stored = known[row["feature"]]
        for name in (*schema.COLUMNS, *schema.LABEL_COLUMNS, "sign"):
            if name not in ("peak_token", "top_logit", "label"):
                assert row[name] == stored[name], name
        assert row["label"] == (labels.get(row["feature"]) or stored["label"]) and row["words_label"] == stored["label"]
        assert row["peak"].encode("utf-8", "backslashreplace") in (
            store.pieces([stored["peak_token"]])[0],
            row["peak"].encode(),
        )
    assert (rows[3]["label_by"], rows[4]["label_by"], rows[5]["label_by"]) == ("hand", "model", "words")
    assert json.loads(rows[4]["scores"]) == {"detection": {"balanced_accuracy": 0.8}}
    assert rows[5]["lists"] == ["starred", "weather"] and rows[6]["lists"] == []
    check_examples(store, examples, ["top", "near_miss"])


def test_a_csv_starts_no_formula(store, tmp_path):
    annotate(store)
    store.annotations.add(6, "label", "@SUM(1)")
    store.annotations.add(7, "label", "-1+2")
    store.annotations.add(8, "label", 'a, "b"\nc')
    features, examples = save_tables(store, tmp_path / "out", format="csv", kinds=["top"])
    for path in (features, examples):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            for name, cell in row.items():
                number = name in ("value", "cosine", "mean", "sign", "quantile_low")
                assert number or not cell.startswith(tuple("=+-@\t\r")), (name, cell)
        if path == features:
            assert [row["label"] for row in rows[6:9]] == ["'@SUM(1)", "'-1+2", 'a, "b"\nc']
            assert rows[3]["label"] == '\'=HYPERLINK("http://example.com")'
            assert float(rows[9]["density"]) == store.feature(9).density and json.loads(rows[5]["lists"]) == [
                "starred",
                "weather",
            ]
        else:
            assert {row["kind"] for row in rows} == {"top"} and json.loads(rows[0]["token_ids"])
            assert len(rows) == sum(len(store.feature(i).examples()) for i in range(len(store)))


def test_both_ends_of_a_signed_feature(tmp_path, tiny_lm):
    sae = saelab.saes.AbsTopKSAE(saelab.saes.AbsTopKConfig(d_sae=16, k=3, normalize="none"), 32)
    texts = [f"The river runs past the mill {i}. It came to pass that the light was good." for i in range(12)]
    store = saelab.collect_features(
        sae,
        tiny_lm,
        texts,
        out_dir=tmp_path / "features",
        hook_name="blocks.1.hook_resid_post",
        ctx_len=32,
        progress=False,
    )
    rows, examples = (pyarrow.parquet.read_table(path).to_pylist() for path in store.to_parquet(tmp_path / "out"))
    check_examples(store, examples, EXAMPLE_KINDS)
    two = [i for i in range(16) if len(store.feature(i).ends) == 2]
    assert two
    for row in rows:
        ends = store.ends(row["feature"])
        expected = ends[1] if len(ends) > 1 else dict.fromkeys(schema.END_COLUMNS)
        assert {name: row[f"other_{name}"] for name in schema.END_COLUMNS} == expected and row["sign"] == store.feature(
            row["feature"]
        ).sign


def test_it_is_whole_or_not_at_all(store, tmp_path, monkeypatch):
    from saelab.features import tables

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_example", lambda example: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.to_parquet(out)
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["run"]
    out.mkdir()
    assert all(path.exists() for path in store.to_parquet(out, kinds=["top"]))
    before = (out / "features.parquet").read_bytes()
    with pytest.raises(SaelabError, match="holds something already"):
        store.to_parquet(out)
    assert (out / "features.parquet").read_bytes() == before
    wrong: list[tuple[dict[str, Any], str]] = [({"format": "xlsx"}, "xlsx"), ({"kinds": ["best"]}, "best")]
    for options, said in wrong:
        with pytest.raises(ValueError, match=said):
            save_tables(store, tmp_path / "other", **options)


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_the_command(store, tmp_path, capsys, monkeypatch, format):
    monkeypatch.setattr("saelab.features.tables.EXAMPLE_KINDS", ("top",))
    words = ["export", str(store.folder.parent), str(tmp_path / "out"), "--format", format]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert str(Path(tmp_path / "out" / f"features.{format}")) in said and f"examples.{format}" in said
    assert main(words) == 2 and "holds something already" in capsys.readouterr().err
