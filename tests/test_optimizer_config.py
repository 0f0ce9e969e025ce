"""Betas, eps and the relative clip: what they do, that a resume keeps them, and that files of older runs still fit."""

import dataclasses

import pytest
import torch

from saelab.benchmarks.planted import superposition
from saelab.saes import ReLUConfig, TopKConfig, TopKSAE
from saelab.training import TrainConfig, train
from saelab.training.adam import Adam
from saelab.training.data import open_data
from saelab.training.optimizer import apply_step
from saelab.training.running_norm import RunningNorm
from saelab.training.sae_run import Run

CPU = torch.device("cpu")
TRAIN = TrainConfig(n_tokens=64 * 20, batch_size=64, warmup_steps=2, checkpoint_every=5, device="cpu")
FIRST = {
    "n_tokens": "1280", "batch_size": "64", "lr": "None", "seed": "0", "warmup_steps": "2", "decay_fraction": "0.2",
    "clip_norm": "1.0", "dead_after_tokens": "None", "checkpoint_every": "5", "log_every": "10", "grad_accumulation": "1",
    "device": "cpu",
}  # fmt: skip
"""What the first version wrote of `TRAIN` into run.json."""


def rows(n: int = 1000) -> torch.Tensor:
    return superposition(d_in=8).held_out(n, 0)


def test_settings_are_those_of_the_first_version_where_nothing_new_is_asked():
    assert TRAIN.settings() == FIRST
    asked = dataclasses.replace(TRAIN, betas=(0, 0.999), eps=1e-9, clip_relative=3).settings()
    assert asked == FIRST | {"betas": "(0.0, 0.999)", "eps": "1e-09", "clip_relative": "3"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"betas": (0.9, 1.0)}, "from 0 to below 1"),
        ({"betas": (-0.1, 0.9)}, "from 0 to below 1"),
        ({"eps": 0.0}, "eps=0.0 must be a positive number"),
        ({"eps": float("inf")}, "eps=inf"),
        ({"clip_relative": 0.5}, "clip_relative=0.5 must be at least 1"),
    ],
)
def test_bad_values_are_named(values, says):
    with pytest.raises(ValueError, match=says):
        TrainConfig(n_tokens=5000, **values)


def test_a_running_norm_by_hand():
    running = RunningNorm(2.0, CPU)
    assert running.excess(4.0) == 1  # nothing to compare it with
    assert running.excess(8.0) == 1  # at the limit
    mean = (0.99 * 4 + 8) / 1.99
    assert running.excess(100.0) == pytest.approx(100 / (2 * mean))
    total, weight = running.state.tolist()
    assert total / weight == pytest.approx((0.99**2 * 4 + 0.99 * 8 + 2 * mean) / (0.99**2 + 0.99 + 1))  # it came in cut


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3], ids="loss x {}".format)
def test_a_relative_clip_cuts_the_same_whatever_the_scale_of_the_loss(scale):
    sae = TopKSAE(TopKConfig(16, 2), 8)
    adam, running = Adam(sae.parameters(), eps=1e-30), RunningNorm(3.0, CPU)
    for spike in (1.0, 1.0, 1.0, 60.0):
        sae.b_dec.grad = torch.full((8,), scale * spike)
        assert apply_step(sae, adam, 0.0, float("inf"), running=running) == pytest.approx(scale * spike * 8**0.5)
    kept = adam.state_dict()[f"{[*dict(sae.named_parameters())].index('b_dec')}.exp_avg"]
    torch.testing.assert_close(kept, torch.full((8,), scale * (0.1 * (0.9**3 + 0.9**2 + 0.9) + 0.1 * 3)))


@pytest.mark.parametrize(
    ("asked", "rules", "eps"), [(None, 2, 2.5e-9), (None, 1, 1e-8), (1e-12, 2, 1e-12), (1e-12, 1, 1e-12)]
)
def test_a_run_takes_its_eps_from_its_size_unless_asked(asked, rules, eps):
    training = TrainConfig(n_tokens=2**20, batch_size=2**20, eps=asked, betas=(0.0, 0.99))
    run = Run(TopKConfig(16, 2), open_data(rows(), None), training, None, None, rules=rules)
    assert run.adam.eps == pytest.approx(eps) and run.adam.betas == (0.0, 0.99)


OPTIONS = {"betas": (0.0, 0.999), "eps": 1e-6, "clip_relative": 1.01}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_changes_a_run(option):
    plain = train(TopKConfig(16, 2), rows(), TRAIN, progress=False)
    changed = train(TopKConfig(16, 2), rows(), dataclasses.replace(TRAIN, **{option: OPTIONS[option]}), progress=False)
    assert plain.hash != changed.hash


@pytest.mark.parametrize("config", [TopKConfig(16, 2), ReLUConfig(16, target_l0=2.0)], ids=["topk", "relu"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_resume_gives_the_same_bits(tmp_path, monkeypatch, config, parts):
    training, real = dataclasses.replace(TRAIN, grad_accumulation=parts, **OPTIONS), Run.train_step
    whole = train(config, rows(), training, tmp_path / "whole", progress=False)

    def stop(self, batch):
        if self.step == 13:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "train_step", stop)
        train(config, rows(), training, tmp_path / "cut", progress=False)
    assert train(config, rows(), training, tmp_path / "cut", progress=False).hash == whole.hash


@pytest.mark.parametrize("name", ["topk", "gated"])
def test_options_are_flags_of_the_command(name):
    import tyro

    from saelab.cli.main import _train_arguments

    words = ["run", "--variant", name, "--d-sae", "64", "--n-tokens", "4096", "--betas", "0", "0.999", "--eps", "1e-9"]
    asked = tyro.cli(_train_arguments(words), args=[*words, "--clip-relative", "3"]).train  # pyright: ignore[reportAttributeAccessIssue]
    assert (asked.betas, asked.eps, asked.clip_relative) == ((0.0, 0.999), 1e-9, 3.0)
