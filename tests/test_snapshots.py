"""Snapshots of a training run: kept on the way, complete or not at all, and without a change of the run's bits."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_saes
import torch
from tiny_runs import HOOK, make_run

import saelab
from saelab.cli.main import main
from saelab.errors import SaelabError
from saelab.features import collect_snapshots
from saelab.features.changes import changes
from saelab.features.matching import match
from saelab.features.store import load_features
from saelab.runs import find_saes, find_snapshots, sae_run, snapshot_folder, step_of
from saelab.saes import Batch, BatchTopKConfig, TopKConfig
from saelab.training import TrainConfig, snapshots, train

PLAIN = TrainConfig(n_tokens=64 * 40, batch_size=64, warmup_steps=5, checkpoint_every=10, log_every=5)
KEEPING = dataclasses.replace(PLAIN, snapshot_every=7)
STEPS = [7, 14, 21, 28, 35]


def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.relu(torch.randn(2000, 32, generator=generator) - 1) @ torch.randn(32, 16, generator=generator)


def weights(folder):
    return {name: (folder / name).read_bytes() for name in ("sae.safetensors", "golden.safetensors", "sae.json")}


def kept(sae_dir):
    return {step_of(one.sae_dir): weights(one.sae_dir) for one in find_snapshots(sae_dir)}


@pytest.fixture(scope="module", params=[TopKConfig(64, 4), BatchTopKConfig(64, 4)], ids=["topk", "batch_topk"])
def undisturbed(request, tmp_path_factory):
    """A config, the folder of a run without snapshots, and that of one with them."""
    folder = tmp_path_factory.mktemp("snapshots")
    for name, config in (("plain", PLAIN), ("keeping", KEEPING)):
        train(request.param, rows(), config, folder / name, progress=False)
    return request.param, folder / "plain", folder / "keeping"


def test_the_training_keeps_its_bits_and_each_snapshot_is_an_sae(undisturbed):
    _, plain, keeping = undisturbed
    assert weights(plain) == weights(keeping)
    assert list(kept(keeping)) == STEPS and not find_snapshots(plain)
    before = None
    for one in find_snapshots(keeping):
        sae = saelab.load_sae(one.sae_dir)  # checks the golden numbers
        assert sae.provenance.trained and sae.provenance.trained["n_tokens"] == 64 * (step_of(one.sae_dir) or 0)
        assert sae.W_dec.norm(dim=1).allclose(torch.ones(64), atol=1e-5)
        assert sae.hash not in (before, saelab.load_sae(plain).hash)
        before = sae.hash


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from saelab.training import sae_run
from test_snapshots import KEEPING, TopKConfig, rows, train
save = sae_run.save_snapshot
def killed_at(folder, step, *rest, **options):
    if step == {step}:
        {now}
    return save(folder, step, *rest, **options)
sae_run.save_snapshot = killed_at
train(TopKConfig(64, 4), rows(), KEEPING, sys.argv[1], progress=False)
"""


@pytest.mark.parametrize("between", [False, True], ids=["before", "while writing"])
def test_a_run_that_was_killed_keeps_the_same_snapshots(tmp_path, undisturbed, between):
    config, plain, keeping = undisturbed
    if config != TopKConfig(64, 4):
        pytest.skip("once is enough")
    now = "os._exit(9)"
    if between:  # the files are there, the folder has not its name yet
        now = "from saelab.training import snapshots; snapshots.shutil.rmtree = lambda *_, **__: os._exit(9)"
    code = KILLED.format(tests=str(Path(__file__).parent), step=21, now=now)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "sae")], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert list(kept(tmp_path / "sae")) == [7, 14] and not (tmp_path / "sae" / "sae.json").exists()
    train(config, rows(), KEEPING, tmp_path / "sae", progress=False)
    assert kept(tmp_path / "sae") == kept(keeping)
    assert weights(tmp_path / "sae") == weights(plain)
    assert {entry.name for entry in (tmp_path / "sae" / "snapshots").iterdir()} == {f"step-{n:08d}" for n in STEPS}


@pytest.mark.parametrize(("first", "then"), [(PLAIN, KEEPING), (KEEPING, PLAIN)], ids=["added", "removed"])
def test_the_option_makes_no_other_run(tmp_path, monkeypatch, undisturbed, first, then):
    """A run that was begun without the option goes on with it, and the other way; a finished one is only opened."""
    config, plain, keeping = undisturbed
    from saelab.training.sae_run import Run

    real = Run.train_step

    def interrupted(self, batch):
        if self.step == 24:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "train_step", interrupted)
        train(config, rows(), first, tmp_path / "sae", progress=False)
    train(config, rows(), then, tmp_path / "sae", progress=False)
    assert weights(tmp_path / "sae") == weights(plain)
    assert list(kept(tmp_path / "sae")) == ([21, 28, 35] if then is KEEPING else [7, 14, 21])
    assert train(config, rows(), then, plain, progress=False).hash == saelab.load_sae(keeping).hash
    assert "snapshot_every" not in json.dumps(json.loads((keeping / "checkpoints" / "run.json").read_text()))


def test_every_variant_can_be_watched(tmp_path):
    """A snapshot is an SAE of its own, whatever its thresholds and averages are at that time."""
    few = dataclasses.replace(KEEPING, n_tokens=64 * 4, snapshot_every=3, device="cpu", checkpoint_every=0)
    for name, variant in saelab.VARIANTS.items():
        x = rows()[:300]
        data = torch.stack([x, x.flip(1)], 1) if name == "crosscoder" else tiny_saes.data(name, x)
        if "d_out" in variant.extra_dims:
            data = Batch(x, x.flip(1))
        config = variant.Config(d_sae=32)
        train(config, data, few, tmp_path / name, progress=False)
        train(config, data, dataclasses.replace(few, snapshot_every=None), tmp_path / f"{name}-plain", progress=False)
        assert weights(tmp_path / name) == weights(tmp_path / f"{name}-plain"), name
        (one,) = find_snapshots(tmp_path / name)
        assert saelab.load_sae(one.sae_dir).variant == name


def test_a_snapshot_that_cannot_be_written_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "save_sae", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(SaelabError, match="The disk is full while writing .*step-00000007"):
        train(TopKConfig(64, 4), rows(), KEEPING, tmp_path / "sae", progress=False)
    assert not find_snapshots(tmp_path / "sae")


@pytest.mark.parametrize("value", [0, -1, True])
def test_a_wrong_number_of_steps_is_named(value):
    with pytest.raises(ValueError, match=f"snapshot_every={value}"):
        TrainConfig(n_tokens=4096, snapshot_every=value)


def test_where_snapshots_and_their_results_are():
    folder = snapshot_folder("run/sae-x", 250)
    one = sae_run(folder)
    assert (one.name, one.sae_dir) == ("sae-x/step-00000250", folder) and step_of(folder) == 250
    assert one.features_dir == Path("run/sae-x/snapshots/features-step-00000250")
    assert step_of("run/sae-x") is None and step_of("elsewhere/step-00000250") is None


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny_lm):
    """A RUN whose SAE kept snapshots, and a store of each."""
    run = make_run(tmp_path_factory.mktemp("watched") / "run", tiny_lm)
    config = TrainConfig(n_tokens=12_000, batch_size=256, warmup_steps=2, snapshot_every=15, device="cpu")
    train(TopKConfig(96, 4), run / "cache", config, run / "sae", progress=False)
    assert main(["features", str(run), "--snapshots", "--n-tokens", "512", "--dtype", "float32"]) == 0
    return run


def test_stores_of_snapshots_see_the_same_contexts(watched, tiny_lm, capsys):
    stores = collect_snapshots(watched / "sae", tiny_lm, n_tokens=512, progress=False)
    assert [store.folder.name for store in stores] == [f"features-step-{n:08d}" for n in (15, 30, 45)]
    assert all((store.contexts == stores[0].contexts).all() for store in stores)
    matching = match(stores[0], stores[2])
    assert matching.n_shared == len(stores[0].sample["tokens"]) > 300
    found = changes(matching)
    alive = [set((store.column("n_fired") > 0).nonzero()[0].tolist()) for store in (stores[0], stores[2])]
    assert set(found.died.tolist()) | set(found.split) <= alive[0]
    assert set(found.born.tolist()) | set(found.merged) <= alive[1]
    assert [one.name for one in find_saes(watched)] == ["sae"]  # commands on a RUN leave snapshots alone
    assert load_features(watched / "sae" / "snapshots" / "features-step-00000030").hook_name == HOOK


def test_without_snapshots_the_command_says_how_to_keep_some(watched, tmp_path, capsys):
    run = Path(shutil.copytree(watched, tmp_path / "run", ignore=shutil.ignore_patterns("snapshots", "cache")))
    assert main(["features", str(run), "--snapshots"]) == 2
    assert "--snapshot-every N" in capsys.readouterr().err
