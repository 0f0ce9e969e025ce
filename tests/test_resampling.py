"""Resampling of dead features: what changes and what does not, which rows they start from, and resumed runs."""

import dataclasses
import json

import pytest
import torch
from tiny_saes import D_IN, D_SAE, build, interrupt_before, rows

import saelab
from saelab.saes import GatedConfig, ReLUConfig, ReLUTranscoderConfig, StepInfo
from saelab.saes.config import settings
from saelab.training.adam import Adam
from saelab.training.dead_features import DeadFeatures
from saelab.training.resampling import is_due, resample

DEAD = [3, 7, 39]


def state(name):
    """An SAE, its optimiser after a step that moved everything, and counters by which three features are dead."""
    sae = build(name)
    adam, dead = Adam(sae.parameters()), DeadFeatures(D_SAE, 100, torch.device("cpu"))
    for parameter in sae.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step(1e-3)
    dead.tokens_since_fired[DEAD] = 100
    return sae, adam, dead


def again(sae, adam, dead, x, step=5, seed=0):
    return resample(sae, adam, dead, x, seed, StepInfo(dead.dead, step, 100))


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_exactly_the_dead_features_start_again(name):
    sae, adam, dead = state(name)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    moments = {key: value.clone() for key, value in adam.state_dict().items()}
    x = rows(50)
    assert again(sae, adam, dead, x) == 3
    alive = torch.tensor([i not in DEAD for i in range(D_SAE)])
    per_feature = [key for key in before if before[key].shape[:1] == (D_SAE,)]
    assert {"W_enc", "W_dec", "b_enc"} <= set(per_feature)
    for key, value in sae.state_dict().items():
        same = value == before[key]
        assert bool(same[alive].all()) if key in per_feature else bool(same.all()), key
    assert bool((sae.b_enc[DEAD] == 0).all()) and bool((sae.W_dec[DEAD] != before["W_dec"][DEAD]).any(1).all())
    assert name != "gated" or not bool(torch.stack([sae.r_mag, sae.b_mag])[:, DEAD].any())
    for index, parameter in enumerate(sae.parameters()):
        for kind in ("exp_avg", "exp_avg_sq"):
            now, then = adam.state_dict()[f"{index}.{kind}"], moments[f"{index}.{kind}"]
            if parameter.shape[:1] == (D_SAE,):
                assert bool((now[DEAD] == 0).all()) and torch.equal(now[alive], then[alive]) and bool((then != 0).all())
            else:
                assert torch.equal(now, then)
    assert not dead.dead.any()


def test_rows_directions_and_lengths_are_those_of_the_paper():
    sae, adam, dead = state("gated")
    length = 0.2 * sae.W_enc[[i for i in range(D_SAE) if i not in DEAD]].norm(dim=1).mean()
    x = rows(50)
    again(sae, adam, dead, x)
    torch.testing.assert_close(sae.W_dec[DEAD].norm(dim=1), torch.ones(3))
    torch.testing.assert_close(sae.W_enc[DEAD], length * sae.W_dec[DEAD])
    centered = sae.normalize(x) - sae.b_dec
    directions = centered / centered.norm(dim=1, keepdim=True)
    nearest = (sae.W_dec[DEAD] @ directions.T).max(1)
    torch.testing.assert_close(nearest.values, torch.ones(3))
    assert len(set(nearest.indices.tolist())) == 3  # each row at most once
    fired = sae.encode(x).to_dense()[nearest.indices, DEAD]
    assert bool((fired > 0).all())


def test_badly_reconstructed_rows_are_drawn_by_the_square_of_their_squared_error():
    """Three rows of which one has twice the squared error of the others: it comes first with probability 4 / 6."""
    sae, adam, dead = state("relu")
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)  # nothing fires: x_hat is b_dec
        sae.b_dec.zero_()
    sae.center.zero_()
    x = torch.zeros(3, D_IN)
    x[0, 0], x[1, 1], x[2, 2] = 2**0.5, 1.0, 1.0
    taken = torch.zeros(3)
    for step in range(600):
        dead.tokens_since_fired.zero_()
        dead.tokens_since_fired[7] = 100
        assert again(sae, adam, dead, x, step=step) == 1
        taken[sae.W_dec[7].argmax()] += 1
        with torch.no_grad():
            sae.b_enc[7] = -1e3
    assert (taken / 600).tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6], abs=0.06)


def test_more_dead_features_than_rows_and_none():
    sae, adam, dead = state("relu")
    dead.tokens_since_fired.fill_(100)
    assert again(sae, adam, dead, rows(10)) == 10 and int(dead.dead.sum()) == D_SAE - 10
    dead.tokens_since_fired.zero_()
    before = sae.hash
    assert again(sae, adam, dead, rows(10)) == 0 and sae.hash == before


def test_when_it_is_due():
    sae = build("relu", resample_every=10)
    assert [step for step in range(70) if is_due(sae, step, 70)] == [9, 19, 29, 39]
    assert [step for step in range(20) if is_due(sae, step, 20)] == [9]  # not after the last step
    assert not any(is_due(build(name), 9, 70) for name in ("relu", "topk"))


@pytest.mark.parametrize("Config", [ReLUConfig, GatedConfig])
def test_a_run_resumes_bit_for_bit_and_is_another_without(Config, tmp_path, monkeypatch):
    config = Config(48, l1_coefficient=10.0, resample_every=6)
    train = saelab.TrainConfig(
        64 * 30, batch_size=64, warmup_steps=2, checkpoint_every=4, dead_after_tokens=64, log_every=1, lr=0.02
    )
    saelab.train(config, rows(500), train, tmp_path / "whole", progress=False)
    logged = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "resampled" in line] == [5, 11, 17, 23]
    assert sum(line.get("resampled", 0) for line in logged) > 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_before(21, patch)
        saelab.train(config, rows(500), train, tmp_path / "cut", progress=False)
    saelab.train(config, rows(500), train, tmp_path / "cut", progress=False)
    weights = [(tmp_path / name / "sae.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    plain = saelab.train(dataclasses.replace(config, resample_every=None), rows(500), train, progress=False)
    assert plain.hash != saelab.load_sae(tmp_path / "whole").hash


def test_off_by_default_and_refused_by_name():
    assert "resample_every" not in settings(ReLUConfig(32)) | settings(GatedConfig(32))
    with pytest.raises(ValueError, match="resample_every=0 must be at least 1"):
        ReLUConfig(32, resample_every=0)
    with pytest.raises(ValueError, match="resample_every=5 is for SAEs that reconstruct what they read"):
        ReLUTranscoderConfig(32, resample_every=5)
