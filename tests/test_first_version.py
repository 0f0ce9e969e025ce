"""What the first version left on disk opens, answers the same calls, and is finished by the rules it was begun by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import saelab
from saelab.evaluation import report as reports

HERE = Path(__file__).with_name("first_version")
FINISHED = sorted(path.name for path in (HERE / "finished").iterdir())
UNFINISHED = sorted(path.name for path in (HERE / "unfinished").iterdir())
HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def lm():
    return saelab.load_model(HERE / "model", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    lines = (HERE / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_sae_opens_and_its_report_answers_the_same_call(name, lm, texts, tmp_path):
    run = shutil.copytree(HERE / "finished" / name, tmp_path / name)
    sae, before = saelab.load_sae(run / "sae"), json.loads((run / "report.json").read_text(encoding="utf-8"))
    if before["request"]["definitions"] == reports._DEFINITIONS:  # measured anew where a measure has another meaning
        marked = before | {"cosine": 0.125}
        (run / "report.json").write_text(json.dumps(marked), encoding="utf-8")
        assert saelab.evaluate(sae, lm, texts, n_tokens_ce=256, path=run / "report.json").cosine == 0.125
    again = saelab.evaluate(sae, lm, texts, n_tokens_ce=256, progress=False)
    for key in ("fvu", "l0", "dead_fraction", "ce_loss_sae", "kl"):
        assert getattr(again, key) == pytest.approx(before[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("name", [name for name in FINISHED if (HERE / "finished" / name / "features").exists()])
def test_a_store_answers_the_same_call(name, lm, texts, tmp_path):
    run = shutil.copytree(HERE / "finished" / name, tmp_path / name)
    sae, before = saelab.load_sae(run / "sae"), _files(run / "features")
    store = saelab.collect_features(sae, lm, texts, out_dir=run / "features", n_tokens=512, top_k=4)
    assert {name: before.get(name) for name in _files(run / "features")} == _files(run / "features")
    busiest = store.feature(int(store.column("density").argmax()))
    assert busiest.p99 and busiest.examples(2) and busiest._repr_html_()


def _call(folder: Path) -> dict[str, Any]:
    call = json.loads((folder / "call.json").read_text(encoding="utf-8"))
    config = saelab.VARIANTS[call["variant"]].Config(**call["config"])
    return {"config": config, "train_config": saelab.TrainConfig(**call["train"]), "hook_name": call["hook_name"]}


@pytest.mark.parametrize("name", UNFINISHED)
@pytest.mark.filterwarnings("ignore:This run resumes under different conditions")
def test_an_unfinished_run_ends_at_the_same_weights(name, tmp_path):
    run = shutil.copytree(HERE / "unfinished" / name, tmp_path / name)
    sae = saelab.train(**_call(run), data=HERE / "cache", out_dir=run / "sae", progress=False)
    assert isinstance(sae, saelab.saes.SAE)
    # Bits differ between kinds of CPU; another rule moves weights by far more.
    torch.testing.assert_close(sae.state_dict(), load_file(run / "final.safetensors"), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:this harvest was begun in another environment")
def test_an_unfinished_harvest_goes_on(lm, texts, tmp_path):
    folder = shutil.copytree(HERE / "unfinished_cache", tmp_path / "run")
    before = _files(folder / "cache")
    sizes: dict[str, Any] = {"ctx_len": 64, "shard_rows": 256, "pool_shards": 2}
    cache = saelab.harvest(lm, texts, [HOOK], 20_000, folder / "cache", **sizes, progress=False)
    expected = json.loads((folder / "final.json").read_text(encoding="utf-8"))
    assert (cache.n_rows, cache.manifest["masked"]) == (expected["n_rows"], expected["masked"])
    now = _files(folder / "cache")
    assert all(now[name] == content for name, content in before.items() if "shards" in name)
    saved = load_file(folder / "final.safetensors")
    for name in ("mean", "second_moment"):
        torch.testing.assert_close(cache.stats(HOOK)[name], saved[name], rtol=1e-3, atol=1e-4)


def test_a_finished_cache_answers_the_same_call(lm, texts, tmp_path):
    folder = shutil.copytree(HERE / "cache", tmp_path / "cache")
    before = _files(folder)
    hooks = [HOOK, "blocks.1.hook_mlp_out"]
    saelab.harvest(lm, texts, hooks, 1_000, folder, ctx_len=64, shard_rows=512, progress=False)
    assert _files(folder) == before
