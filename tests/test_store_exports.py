"""Feature stores in the files of SAEDashboard and of Neuronpedia hold what the store says."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

import saelab
from saelab.cli.main import main
from saelab.interop import neuronpedia, sae_dashboard


@pytest.fixture
def store(hostile_run):
    return saelab.load_features(hostile_run)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_sae_dashboards_batches(store, tmp_path):
    files = sae_dashboard.save_store(store, tmp_path, batch_size=40)
    batches = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    assert [path.name for path in files] == [f"batch-{i}.json" for i in range(len(files))] and len(files) > 1
    found = {one["feature_index"]: one for batch in batches for one in batch["features"]}
    assert set(found) == {i for i in range(len(store)) if store.feature(i).n_fired}
    assert batches[0]["layer"] == 1
    for index, one in found.items():
        feature = store.feature(index)
        assert one["frac_nonzero"] == feature.density and sum(one["freq_hist_data_bar_heights"]) == feature.n_fired
        for example, strongest in zip(feature.examples(), one["activations"], strict=True):
            assert strongest["values"][strongest["qualifying_token_index"]] == pytest.approx(example.value)
            assert len(strongest["tokens"]) == len(example.token_ids)


def test_neuronpedias_lines(store, tmp_path):
    files = neuronpedia.save_store(store, tmp_path, batch_size=40)
    home = files[-1].parent
    assert home.parent.parent == tmp_path and home.name == "1-saelab-topk-resid-post"
    features = [line for i in range(3) for line in lines(home / "features" / f"batch-{i}.jsonl.gz")]
    assert [line["index"] for line in features] == list(range(len(store)))
    examples = [line for i in range(3) for line in lines(home / "activations" / f"batch-{i}.jsonl.gz")]
    for line in features:
        feature, logits = store.feature(line["index"]), store.feature(line["index"]).top_logits
        assert line["maxActApprox"] == (feature.max or 0) and line["frac_nonzero"] == feature.density
        assert line["pos_str"] == [token for token, _ in logits.positive]
        own = [one for one in examples if one["index"] == feature.feature]
        peaks = [one["values"][one["qualifyingTokenIndex"]] for one in own]
        assert peaks == pytest.approx([one.value for one in feature.examples()])
        for one, stored in zip(own, feature.examples(), strict=True):
            assert one["values"][one["maxValueTokenIndex"]] == one["maxValue"] == max(one["values"])
            assert one["values"] == pytest.approx(stored.values) and one["layer"] == line["layer"] == home.name
    source = json.loads((home / "source.jsonl").read_text(encoding="utf-8"))
    assert (source["id"], source["modelId"]) == (home.name, home.parent.name)
    again = neuronpedia.save_store(store, tmp_path / "again", batch_size=40)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]


@pytest.mark.parametrize("name", ["/a/Model of: mine/", "../..", "org/Gemma-2.2B_it", "", "..."])
def test_names_of_models_stay_inside_the_folder(store, tmp_path, name):
    store.manifest["model"]["name"] = name
    out = tmp_path / "out"
    for path in neuronpedia.save_store(store, out):
        assert path.resolve().is_relative_to(out.resolve()) and len(path.relative_to(out).parts) in (3, 4)


@pytest.mark.parametrize("format", ["sae_dashboard", "neuronpedia"])
def test_the_command(hostile_run, tmp_path, capsys, format):
    run = tmp_path / "run"
    shutil.copytree(hostile_run, run)
    assert main(["export", str(run), str(tmp_path / "out"), "--format", format]) == 0
    assert "files with the features of" in capsys.readouterr().out
    assert any((tmp_path / "out").rglob("*.json*"))
