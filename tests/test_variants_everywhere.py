"""Every variant through the command line to the dashboard: train, eval, features, probe, steer, and the pages that show it."""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import write_texts
from tiny_saes import config_of

from saelab.benchmarks.family import TRANSCODERS
from saelab.cli import main
from saelab.features.store import load_features
from saelab.saes import VARIANTS

HOOKS = ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out")
FLAGS = {
    "crosscoder": [],
    "cross_layer_transcoder": ["--hook-names", *HOOKS],
    **dict.fromkeys(TRANSCODERS, ["--hook-name", HOOKS[0], "--hook-name-out", HOOKS[1]]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder) -> Path:
    """A RUN whose cache holds two sites of the tiny model."""
    folder = tmp_path_factory.mktemp("family") / "run"
    texts = write_texts(folder.parent / "notes.jsonl")
    source = ["--model", str(tiny_folder), "--dtype", "float32", "--texts", str(texts), "--ctx-len", "64"]
    assert (
        main.main(["harvest", str(folder), "--hook-name", *HOOKS, "--n-tokens", "4_000", "--gradients", *source]) == 0
    )
    return folder


def _an_unmodified_code_changes_no_bit(lm, feature):
    """Identity E27: with the reconstruction error kept, as all edits do."""
    prompt = list(feature.examples(1)[0].token_ids)
    plain = lm.logits(prompt)
    with lm.steer(feature.scale(1.0)):
        assert torch.equal(lm.logits(prompt), plain)
    with lm.steer(feature.scale(3.0)):
        assert not torch.equal(lm.logits(prompt), plain)


@pytest.mark.parametrize("name", VARIANTS)
def test_from_the_command_line_to_the_dashboard(run, name, tiny_lm, capsys, open_page):
    sae = run / f"sae-{name}"
    size = ["--d-sae", "48", "--n-tokens", "6_000", "--batch-size", "200"]
    size += ["--k", "4"] if hasattr(config_of(name), "k") else []
    flags = FLAGS.get(name, ["--hook-name", HOOKS[0]])
    for step in (["train", str(run), "--name", name, "--variant", name, *size, *flags], ["features", str(sae)]):
        assert main.main(step) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main.main(["eval", str(sae), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["fvu"] < 2 and report["l0"] > 0 and report["ce_loss_recovered"] is not None
    store = load_features(run / f"features-{name}")
    busiest = int(store.column("density").argmax())
    if name not in FLAGS:  # those read elsewhere than they write: no edit of their code alone leaves the model as it is
        _an_unmodified_code_changes_no_bit(tiny_lm, store.feature(busiest))
    for page in ("feature", "steer"):
        app = open_page(page, run, sae=sae.name, feature=busiest)
        assert not app.exception and not app.error, (page, app.exception, app.error)
    small = ["--n-train", "32", "--n-test", "32", "--ks", "2", "--n-splits", "1", "--n-hard-sets", "0"]
    assert main.main(["probe", str(sae), "--sets", "wordnet_noun.food", *small]) == 0, capsys.readouterr()
    assert (run / "probing" / f"report-{name}.json").exists()
    assert main.main(["steer", str(sae), "--feature", str(busiest), "--max-new-tokens", "3"]) == 0, capsys.readouterr()
    assert "add 2" in capsys.readouterr().out
