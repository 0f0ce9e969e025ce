"""What people add to features is never lost: not by another writer, a merge, or a bad file."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading

import pytest

from saelab.errors import StoreError
from saelab.features.annotations import KINDS, Annotations


@pytest.fixture
def notes(tmp_path):
    return Annotations(tmp_path / "annotations.sqlite", "a" * 64)


def test_the_latest_counts_and_none_takes_back(notes):
    assert notes.latest("label") == [] and not notes.path.exists()
    notes.add(3, "label", "first", author="ann")
    notes.add(3, "label", "second", author="bob")
    notes.add(4, "label", "other")
    assert [(one.feature, one.value) for one in notes.latest("label")] == [(3, "second"), (4, "other")]
    assert notes.latest("label")[0].author == "bob" and notes.latest("label")[0].time.startswith("20")
    notes.add(3, "label", None)
    assert [one.feature for one in notes.latest("label")] == [4]
    notes.add(3, "score", 0.5, name="detection")
    notes.add(3, "score", 0.7, name="fuzz")
    assert [(one.name, one.value) for one in notes.latest("score")] == [("detection", 0.5), ("fuzz", 0.7)]
    assert [one.value for one in notes.latest("score", "fuzz")] == [0.7]
    assert [(one.kind, one.name) for one in notes.of(3)] == [("score", "detection"), ("score", "fuzz")]
    other = Annotations(notes.path, "b" * 64)
    assert other.latest("label") == [] and other.of(4) == []


def test_two_writers_lose_nothing(notes):
    notes.add(0, "note", "begin")

    def write(number):
        for i in range(20):
            Annotations(notes.path, notes.sae_hash).add(i, "note", f"{number}-{i}", name=str(number))

    code = (
        "import sys; from saelab.features.annotations import Annotations\n"
        "for i in range(20): Annotations(sys.argv[1], sys.argv[2]).add(i, 'note', f'p-{i}', name='process')"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(notes.path), notes.sae_hash])
    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert process.wait() == 0
    assert len(notes.latest("note")) == 1 + 4 * 20


def test_merging_is_the_union_in_any_order(notes, tmp_path):
    other = Annotations(tmp_path / "other.sqlite", notes.sae_hash)
    notes.add(1, "label", "mine")
    other.add(1, "label", "theirs")
    other.add(2, "list", True, name="weather")
    assert other.export(tmp_path / "theirs.jsonl") == 2
    assert notes.merge(tmp_path / "theirs.jsonl") == 2 and notes.merge(tmp_path / "theirs.jsonl") == 0
    notes.export(tmp_path / "mine.jsonl")
    other.merge(tmp_path / "mine.jsonl")
    for kind in KINDS:
        assert notes.latest(kind) == other.latest(kind)
    assert notes.latest("label")[0].value == "theirs"


BAD = {
    "no JSON": "{",
    "a list": "[]",
    "a missing key": '{"id": "1"}',
    "a feature that is text": json.dumps(
        {"id": "1", "sae": "a", "feature": "x", "kind": "label", "name": "", "value": None, "author": "", "time": ""}
    ),
    "a value that is no JSON": json.dumps(
        {"id": "1", "sae": "a", "feature": 1, "kind": "label", "name": "", "value": "{", "author": "", "time": ""}
    ),
    "an unknown kind": json.dumps(
        {"id": "1", "sae": "a", "feature": 1, "kind": "thing", "name": "", "value": None, "author": "", "time": ""}
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_adds_nothing(notes, tmp_path, name):
    other = Annotations(tmp_path / "other.sqlite", notes.sae_hash)
    other.add(1, "label", "fine")
    other.export(tmp_path / "lines.jsonl")
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write(BAD[name] + "\n")
    with pytest.raises(StoreError, match="line 2, is no annotation"):
        notes.merge(tmp_path / "lines.jsonl")
    assert notes.latest("label") == []


def test_bad_kinds_values_and_files_are_named(notes, tmp_path):
    with pytest.raises(ValueError, match="kind='opinion' is unknown; expected one of label, model_label"):
        notes.add(1, "opinion", "x")
    with pytest.raises(ValueError):
        notes.add(1, "score", float("nan"))
    notes.path.write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="restore or move it away"):
        notes.latest("label")
    with pytest.raises(StoreError):
        notes.add(1, "label", "x")
    assert notes.path.read_bytes() == b"not a database" * 100
    assert sqlite3.sqlite_version_info >= (3, 35)
