"""Everything from texts to a steered text on one device, the GPU where there is one; what was made there is read on the CPU."""

import pytest
import torch
from tiny_runs import HOOK, WORDS, make_run
from tiny_saes import config_of

import saelab
from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.streaming import stream
from saelab.cli import main
from saelab.models import load_model
from saelab.saes import VARIANTS
from saelab.steering.effect_table import effect_table

WRITES = "blocks.1.hook_mlp_out"
SAES = ("topk", "batch_topk", "jumprelu", "matching_pursuit", "codebook")


@pytest.fixture(scope="module")
def lm(tiny_folder, device):
    return load_model(tiny_folder, dtype=torch.float32, device=device)


@pytest.fixture(scope="module")
def run(tmp_path_factory, lm):
    return make_run(tmp_path_factory.mktemp("pipeline") / "run", lm)


def settings(device, **more):
    return saelab.TrainConfig(**({"n_tokens": 8_000, "batch_size": 256, "warmup_steps": 4, "device": device} | more))


@pytest.mark.parametrize("name", SAES)
def test_an_sae_is_trained_measured_collected_and_steers(name, device, lm, run, tmp_path):
    cache = ActivationCache(run / "cache")
    sae = saelab.train(config_of(name, 48), cache, settings(device), tmp_path / "sae", progress=False)
    assert sae.W_dec.device.type == lm.device.type == torch.device(device).type
    report = saelab.evaluate(sae, lm, n_tokens_ce=256, progress=False)
    elsewhere = saelab.evaluate(saelab.load_sae(tmp_path / "sae"), lm, n_tokens_ce=256, progress=False)
    for key in ("fvu", "fvu_special", "l0", "ce_loss_sae"):
        assert getattr(elsewhere, key) == pytest.approx(getattr(report, key), rel=1e-3, abs=1e-3), key
    store = saelab.collect_features(sae, lm, out_dir=tmp_path / "features", progress=False)
    row = store.table(sort="p99", where={"n_fired": (1, None)}, limit=1)[0]
    feature = store.feature(row["feature"])
    plain = lm.logits(WORDS[0] + " " + WORDS[1])
    for edit in (feature * 2.0, feature.clamp(1.0), feature.scale(0.5), feature.ablate()):
        with lm.steer(edit):
            assert lm.logits(WORDS[0] + " " + WORDS[1]).isfinite().all()
            assert len(lm.generate(WORDS[0], max_new_tokens=3)) >= len(WORDS[0])
    assert torch.equal(lm.logits(WORDS[0] + " " + WORDS[1]), plain)
    assert effect_table(lm, [feature], prompts=["the river"], n_random=2, show=False).rows


def test_vectors_streams_and_rows_of_another_device(device, lm, tmp_path):
    direction = saelab.steering.diff_means(lm, ["the old mill"], ["see the light"], HOOK)
    for edit in (direction * 2.0, direction.add(0.5, "resid_norm"), direction.ablate()):
        assert lm.run_with_edit("the river runs", edit).isfinite().all()
    texts = [" ".join(WORDS[i:] + WORDS[:i]) + f" {i}" for i in range(60)]
    sae = saelab.train(
        config_of("topk", 32),
        stream(lm, texts, [HOOK], ctx_len=32),
        settings(device, n_tokens=2_000),
        tmp_path / "sae",
        progress=False,
    )
    rows = torch.randn(70, sae.d_in)
    assert torch.equal(sae(rows).x_hat, sae(rows.to(device)).x_hat)
    with pytest.raises(ValueError, match="width"):
        sae(rows[:, 1:])


@pytest.mark.parametrize("name", ["crosscoder", "transcoder"])
def test_several_sites(name, device, lm, run, tmp_path):
    texts = run / "texts.jsonl"
    cache = saelab.harvest(lm, texts, [HOOK, WRITES], 4_000, tmp_path / "cache", ctx_len=64, progress=False)
    hooks = {} if name == "crosscoder" else {"hook_name": HOOK}
    more = {} if name == "crosscoder" else {"hook_name_out": WRITES}
    assert name in VARIANTS
    sae = saelab.train(config_of(name, 48, **more), cache, settings(device), tmp_path / "sae", progress=False, **hooks)
    report = saelab.evaluate(sae, lm, n_tokens_ce=128, progress=False)
    assert report.fvu is not None and 0 < report.fvu < 2 and report.ce_loss_recovered is not None
    store = saelab.collect_features(sae, lm, out_dir=tmp_path / "features", progress=False)
    fired = store.table(sort="p99", where={"n_fired": (1, None)}, limit=1)[0]
    with lm.steer(store.feature(fired["feature"]) * 2.0):
        assert lm.logits("the river").isfinite().all()


def test_commands(device, run, tiny_folder, capsys):
    train = ["train", str(run), "--d-sae", "48", "--k", "4", "--n-tokens", "4000", "--batch-size", "256"]
    for command in (
        [*train, "--device", device],
        ["eval", str(run), "--model", str(tiny_folder)],
        ["features", str(run), "--model", str(tiny_folder)],
        ["steer", str(run), "--feature", "0", "--strength", "0", "--mode", "scale", "--model", str(tiny_folder)],
    ):
        assert main.main(command) == 0, (command, capsys.readouterr())
    assert (run / "report.json").is_file() and (run / "features" / "manifest.json").is_file()
