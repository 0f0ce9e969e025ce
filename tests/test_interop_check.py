"""`saelab import`: an SAE is checked on real activations, and a switch that is wrong is named with what it would give instead."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from foreign_saes import CASES
from safetensors.torch import load_file, save_file
from tiny_runs import write_texts

import saelab
from saelab.cli import main
from saelab.errors import SaelabError
from saelab.interop.check import Check, Trial, check
from saelab.interop.importing import import_sae
from saelab.interop.reading import read_blueprint
from saelab.interop.source import LocalSource

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def released(tmp_path_factory, tiny_lm, tiny_folder) -> tuple[Path, Path]:
    """A TopK SAE trained on the tiny model, in SAELens' form with a claimed L0, and the texts."""
    folder = tmp_path_factory.mktemp("released")
    texts = write_texts(folder / "notes.jsonl")
    cache = saelab.harvest(tiny_lm, texts, [HOOK], 6_000, folder / "cache", ctx_len=64, progress=False)
    config = saelab.saes.TopKConfig(64, 6, normalize="none")
    sae: Any = saelab.train(config, cache, saelab.TrainConfig(60_000, 200, lr=3e-3), folder / "sae", progress=False)
    saelab.save_sae(sae, folder / "lens", format="sae_lens")
    change(folder / "lens", model_name=str(tiny_folder), l0=6.0)
    return folder / "lens", texts


def change(folder: Path, **metadata: Any) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    top = {key: metadata.pop(key) for key in list(metadata) if key in cfg}
    cfg = cfg | top | {"metadata": cfg["metadata"] | metadata}
    (folder / "cfg.json").write_text(json.dumps(cfg))


def spoiled(released: tuple[Path, Path], tmp_path: Path, **metadata: Any) -> Path:
    shutil.copytree(released[0], tmp_path / "spoiled")
    change(tmp_path / "spoiled", **metadata)
    return tmp_path / "spoiled"


def test_the_right_reading_gives_no_warning(released, tmp_path, capsys):
    source, texts = released
    assert main.main(["import", str(source), str(tmp_path / "run"), "--texts", str(texts), "--n-tokens", "2000"]) == 0
    said = capsys.readouterr().out
    assert "Warning" not in said and "L0 6.0 (claimed: 6), FVU 0." in said and "CE recovered" in said
    assert f"sae_lens, topk, 64 features, {HOOK}" in said and "Next: saelab eval" in said
    origin = json.loads((tmp_path / "run" / "sae" / "sae.json").read_text())
    trials = origin["imported"]["check"]["trials"]
    changes = [trial["change"] for trial in trials]
    assert changes[0] == {} and {"pre_bias": False} in changes and {"normalize": "layer_norm"} in changes
    assert {"hook_name": "blocks.1.hook_resid_pre"} in changes and {"hook_name": "blocks.0.hook_resid_post"} in changes
    assert any("scale" in one for one in changes) and any("prepend_bos" in one for one in changes)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"apply_b_dec_to_input": False}, {"pre_bias": True}),
        ({"hook_name": "blocks.1.hook_resid_pre"}, {"hook_name": HOOK}),
        ({"hook_name": "blocks.0.hook_resid_post"}, {"hook_name": HOOK}),
    ],
    ids=["b_dec not subtracted", "the other side", "the layer before"],
)
def test_a_wrong_switch_is_named_first(released, tmp_path, tiny_lm, wrong, named):
    source = spoiled(released, tmp_path, **wrong)
    found = check(_plan(source), tiny_lm, saelab.load_texts(released[1]), 2000, progress=False)
    assert found.better and dict(found.better[0].change) == named
    assert found.warnings()[0].startswith(f"assume={named} would give FVU 0.")


def _plan(source: Path) -> Any:
    return read_blueprint(LocalSource(source))


def test_an_l0_that_only_an_alternative_has_is_named():
    assumed, other, worse = Trial({}, 6.0, 0.3), Trial({"k": 12}, 12.0, 0.29), Trial({"k": 13}, 12.5, 0.4)
    found = Check(assumed, (worse, other), 12.0, 100)
    assert [dict(trial.change) for trial in found.better] == [{"k": 12}]
    assert not Check(assumed, (worse, other), 6.2, 100).better and not Check(assumed, (other,), None, 100).warnings()
    assert "The L0 is 6.0, but the files claim 40" in Check(assumed, (other,), 40.0, 100).warnings()[0]
    partial = Check(Trial({}, 6.0, None), (Trial({"prepend_bos": False}, 12.0, None),), 12.0, 100)
    assert partial.warnings() == [
        "assume={'prepend_bos': False} would give L0 12.0 instead of L0 6.0 (claimed: L0 12)."
    ]


def test_every_command_works_on_an_imported_run(released, tmp_path, capsys):
    source, texts = released
    run = tmp_path / "run"
    for words in (
        ["import", str(source), str(run), "--texts", str(texts), "--n-tokens", "1000"],
        ["eval", str(run)],
        ["features", str(run)],
    ):
        assert main.main(words) == 0, capsys.readouterr().err
    report = json.loads((run / "report.json").read_text())
    assert report["l0"] == pytest.approx(6.0, abs=0.1) and report["split"] == "held_out"
    store = saelab.load_features(run)
    busiest = int(store.column("density").argmax())
    assert main.main(["steer", str(run), "--feature", str(busiest), "--max-new-tokens", "3"]) == 0
    again = ["import", str(source), str(run), "--texts", str(texts), "--n-tokens", "1000"]
    assert main.main(again) == 0  # the same SAE


def test_what_cannot_be_imported_leaves_nothing(released, tmp_path, tiny_lm, capsys):
    source, texts = released
    run, words = tmp_path / "run", ["--texts", str(texts), "--n-tokens", "1000"]
    assert main.main(["import", str(tmp_path / "none"), str(run), *words]) == 2
    assert "does not exist, and is no id of the hub" in capsys.readouterr().err
    wider = CASES["sae_lens standard"](tmp_path / "wide").path
    with pytest.raises(ValueError, match=r"has width 64, but the SAE reads d_in=32"):
        import_sae(wider, run, tiny_lm, texts, assume={"hook_name": "blocks.1.mlp.hook_post"}, progress=False)
    nameless = CASES["dictionary_learning checkpoint without its class"](tmp_path / "nameless").path
    assert main.main(["import", str(nameless), str(run), *words]) == 2
    assert "does not name its language model: pass --model" in capsys.readouterr().err
    with pytest.raises(SaelabError, match="does not say which hook it reads: pass --assume hook_name="):
        import_sae(nameless, run, tiny_lm, texts, progress=False)
    assert main.main(["import", str(source), str(run), *words, "--assume", "k"]) == 2
    assert "--assume takes KEY=VALUE, such as k=64; got 'k'" in capsys.readouterr().err
    assert not run.exists()
    import_sae(source, run, tiny_lm, texts, n_tokens=500, progress=False)
    other = spoiled(released, tmp_path)
    tensors = load_file(other / "sae_weights.safetensors")
    save_file(tensors | {"b_dec": tensors["b_dec"] + 1}, other / "sae_weights.safetensors")
    with pytest.raises(SaelabError, match="holds another SAE: import into another RUN folder"):
        import_sae(other, run, tiny_lm, texts, progress=False)
