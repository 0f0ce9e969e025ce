"""The features of a crosscoder of two models are verified and read in texts with both, and with no others."""

import json

import pytest
import torch
from conftest import build_tiny_llama

import saelab
from saelab.cli.main import main
from saelab.features.collected_with import all_models, model_names, steered_model
from saelab.features.reading import read_text
from saelab.features.tools import Tools
from saelab.models import load_model

HOOK = "blocks.1.hook_resid_post"
TEXTS = [f"{i} sheep and {i * i} goats in the field {i} of part {i % 7}" for i in range(120)]


@pytest.fixture(scope="module")
def other_lm(tmp_path_factory):
    folder = build_tiny_llama(tmp_path_factory.mktemp("models") / "other", seed=1)
    return load_model(folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def run(tiny_lm, other_lm, tmp_path_factory):
    """A run of two models, with features."""
    folder, both = tmp_path_factory.mktemp("two") / "run", [tiny_lm, other_lm]
    (texts := folder.parent / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    cache = saelab.harvest(both, str(texts), HOOK, 1500, folder / "cache", ctx_len=32, progress=False)
    config = saelab.TrainConfig(n_tokens=6000, batch_size=200, warmup_steps=5, checkpoint_every=0)
    saelab.train(saelab.saes.CrosscoderConfig(d_sae=64, k=8), cache, config, folder / "sae", progress=False)
    sae = saelab.load_sae(folder / "sae")
    saelab.collect_features(sae, both, out_dir=folder / "features", progress=False)
    return folder


def test_a_store_of_two_models_holds(run, tiny_lm, other_lm, capsys):
    found = saelab.load_features(run).verify([tiny_lm, other_lm], 20, progress=False)
    assert found.n_examples >= 20 and found.largest_error < 1e-3
    assert main(["verify", str(run), "--dtype", "float32", "--n-examples", "5"]) == 0
    assert "holds: hashes" in capsys.readouterr().out


def test_a_text_is_read_by_both(run, tiny_lm, other_lm):
    store, both = saelab.load_features(run), [tiny_lm, other_lm]
    reading = read_text(store, both, TEXTS[0])
    ids = tiny_lm.to_ids(TEXTS[0])
    x = torch.stack([next(iter(lm.stream_activations([ids], HOOK)))[HOOK][0].float() for lm in both], 1)
    torch.testing.assert_close(reading.feature_acts.to_dense(), store.sae.encode(x).to_dense().detach())
    asked = Tools(store, lambda: both).top_features(TEXTS[0])
    assert asked["n_tokens"] == len(store.top_features(both, TEXTS[0])) == ids.shape[1] and asked["features"]
    assert store.contrast(both, TEXTS[:12], ["The weather is fine"]).a.n_texts == 12


@pytest.mark.parametrize("given", [["other"], ["tiny"], ["other", "tiny"], ["tiny", "tiny"]])
def test_other_models_are_refused(run, tiny_lm, other_lm, given):
    store = saelab.load_features(run)
    lm = [{"tiny": tiny_lm, "other": other_lm}[name] for name in given]
    for ask in (lambda: all_models(store, lm), lambda: store.verify(lm), lambda: store.top_features(lm, "sheep")):
        with pytest.raises(ValueError, match=r"tiny-llama \+ other: give these models as a list in this order, not"):
            ask()


def test_its_features_are_steered_in_the_last(run, tiny_lm, other_lm):
    store = saelab.load_features(run)
    assert model_names(store) == [tiny_lm.name, other_lm.name]
    assert steered_model(store, [tiny_lm, other_lm]) is steered_model(store, other_lm) is other_lm
    with pytest.raises(ValueError, match="other weights"):
        steered_model(store, tiny_lm)


@pytest.mark.parametrize("page", ["prompt", "texts"])
def test_the_pages_read_with_both(run, open_page, page):
    app = open_page(page, run)
    next(button for button in app.button if button.label in ("Read", "Compare")).click().run()
    assert not app.exception and not app.error
    (code,) = [block.value for block in app.code if "lm = " in block.value]
    names: dict = {}
    exec(code, names)
    assert [lm.name for lm in names["lm"]] == model_names(saelab.load_features(run))
