"""`saelab verify`: a store that was altered is noticed, also where every hash was made to fit again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import saelab
from saelab.cli.main import main
from saelab.errors import StoreError
from saelab.features import schema
from saelab.features.blob import pack_arrays, unpack_arrays
from saelab.features.verify import check_numbers


@pytest.fixture
def run(hostile_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(hostile_run, folder)
    return folder


def alive(run: Path) -> int:
    store = saelab.load_features(run)
    return store.table("n_fired", limit=1)[0]["feature"]


def test_an_untouched_store_is_verified_and_it_is_recorded(run, tiny_lm):
    store = saelab.load_features(run)
    found = store.verify(tiny_lm, progress=False)
    assert found.n_examples > 100 and found.n_contexts > 5 and found.largest_error < 1e-4 and found.n_features == 96
    (entry,) = store.annotations.latest("verified")
    assert entry.value["n_examples"] == found.n_examples and entry.feature == -1
    assert store.verify() is None


@pytest.mark.parametrize("name", [schema.DATABASE, schema.TOKENS, schema.SAMPLE])
def test_one_changed_byte_is_noticed(run, name):
    path = run / "features" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=f"{name} was altered"):
        saelab.load_features(run)


def hash_again(run: Path) -> None:
    """What somebody does who alters a store."""
    path = run / "features" / schema.MANIFEST
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (run / "features" / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def altered(run: Path, feature: int, kind: str, change) -> None:
    with contextlib.closing(sqlite3.connect(run / "features" / schema.DATABASE)) as database, database:
        sql = "SELECT data FROM blob WHERE feature = ? AND kind = ?"
        ((data,),) = database.execute(sql, [feature, kind]).fetchall()
        arrays = {name: array.copy() for name, array in unpack_arrays(data).items()}
        change(arrays)
        database.execute(
            "UPDATE blob SET data = ? WHERE feature = ? AND kind = ?", [pack_arrays(arrays), feature, kind]
        )


def set_value(arrays, row, factor, window=False):
    arrays["value"][row] *= factor
    if window:
        arrays["window"][row, schema.WINDOW_LEFT] *= factor


CHANGES = {
    "the value of the strongest example": lambda run, i: altered(run, i, "examples", lambda a: set_value(a, 0, 1.5)),
    "the same in value and window": lambda run, i: altered(run, i, "examples", lambda a: set_value(a, 0, 1.5, True)),
    "a middle example, in both": lambda run, i: altered(run, i, "examples", lambda a: set_value(a, 3, 1.2, True)),
    "all of the uniform sample": lambda run, i: altered(
        run, i, "uniform", lambda a: set_value(a, slice(None), 0.7, True)
    ),
    "an example's position": lambda run, i: altered(run, i, "examples", lambda a: a["position"].__iadd__(1)),
    "the histogram": lambda run, i: altered(run, i, "histogram", lambda a: a["counts"].__iadd__(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_store_that_was_hashed_again_does_not_hold(run, tiny_lm, name):
    feature = alive(run)
    CHANGES[name](run, feature)
    hash_again(run)
    store = saelab.load_features(run)
    with pytest.raises(StoreError, match=f"feature {feature}\\b.*altered"):
        store.verify(tiny_lm, 400, progress=False)


def test_a_value_has_to_be_that_of_its_window(run):
    feature = alive(run)
    altered(run, feature, "uniform", lambda a: set_value(a, -1, 0.9))
    hash_again(run)
    with pytest.raises(StoreError, match="uniform examples differs from the one in its window"):
        check_numbers(saelab.load_features(run), feature)


@pytest.mark.parametrize(("column", "value"), [("n_fired", 3), ("max", 1e3), ("density", 0.5)])
def test_an_altered_metric_does_not_hold(run, tiny_lm, column, value):
    feature = alive(run)
    with contextlib.closing(sqlite3.connect(run / "features" / schema.DATABASE)) as database, database:
        database.execute(f'UPDATE feature SET "{column}" = ? WHERE feature = ?', [value, feature])
    hash_again(run)
    with pytest.raises(StoreError, match=f"feature {feature}: .*altered"):
        saelab.load_features(run).verify(tiny_lm, 5, progress=False)


def test_other_tokens_do_not_hold(run, tiny_lm):
    path = run / "features" / schema.TOKENS
    tensors = load_file(path)
    tensors["ids"] = (tensors["ids"] + 1) % 300
    save_file(tensors, path)
    hash_again(run)
    with pytest.raises(StoreError, match="model and SAE give"):
        saelab.load_features(run).verify(tiny_lm, 20, progress=False)


def test_another_model_is_refused(run, tmp_path):
    from conftest import build_tiny_llama

    other = saelab.load_model(build_tiny_llama(tmp_path / "other", seed=5))
    with pytest.raises(ValueError, match="other weights"):
        saelab.load_features(run).verify(other, progress=False)


def test_the_command(run, tiny_folder, capsys):
    assert main(["verify", str(run), "--model", str(tiny_folder), "--dtype", "float32", "--n-examples", "20"]) == 0
    said = capsys.readouterr().out
    assert "holds: hashes, the numbers of 96 features" in said
    altered(run, alive(run), "examples", lambda a: set_value(a, 0, 1.5, True))
    hash_again(run)
    assert main(["verify", str(run), "--model", str(tiny_folder), "--dtype", "float32"]) == 2
    assert "altered" in capsys.readouterr().err
