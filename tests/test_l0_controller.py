"""The coefficient of sparsity: its warm-up, one move by hand, and that L0 arrives, stays, and goes on from a checkpoint."""

import json
import math
from typing import Any

import pytest
import torch

from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import VARIANTS, GatedConfig, JumpReLUConfig, ReLUConfig, StepInfo, l0_controller
from saelab.saes.l0_controller import EMA_DECAY, INTEGRAL_GAIN, PROPORTIONAL_GAIN, RAMP_FRACTION, L0Controller
from saelab.training import TrainConfig, sae_run, train

NONE_DEAD = torch.zeros(4096, dtype=torch.bool)


def codes(l0, batch=1000):
    """A batch with that mean L0."""
    n = round(l0 * batch)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.full((batch,), n)])
    return SparseActs(torch.ones(n), torch.zeros(n, dtype=torch.int64), offsets, 4096)


def at(step, n_steps=100):
    return StepInfo(NONE_DEAD, step, n_steps)


def test_without_a_target_it_rises_to_a_constant():
    constant = L0Controller(2.0, 0.05, None)
    assert [float(constant(codes(64), at(step))) for step in (0, 1, 3, 4, 99)] == pytest.approx([0.4, 0.8, 1.6, 2, 2])
    assert not constant.state_dict()
    assert float(L0Controller(2.0, 0.0, None)(codes(64), at(0))) == 2


def test_two_steps_by_hand():
    """L0 starts at 64 and is to be 8: at step 1 the wanted one has gone 1 / (FALL 100) of the way, and L0 is 100."""
    control = L0Controller(2.0, 0.0, 8.0)
    assert float(control(codes(64), at(0))) == pytest.approx(2)  # no error at the start
    wanted = math.log(8) + math.log(64 / 8) * (1 - 1 / (RAMP_FRACTION * 100))
    error = (1 - EMA_DECAY) * (math.log(100) - wanted)
    assert float(control(codes(100), at(1))) == pytest.approx(
        2 * math.exp((INTEGRAL_GAIN + PROPORTIONAL_GAIN) * error), rel=1e-5
    )
    assert 0 < error < 0.5


def test_between_the_wanted_l0_and_the_target_nothing_moves():
    control = L0Controller(2.0, 0.0, 8.0)
    moved = [float(control(codes(l0), at(step))) for step, l0 in enumerate((64, 20, 9, 7))]
    assert moved[:3] == pytest.approx([2, 2, 2]) and moved[3] < 1.9


def test_parts_of_one_step_share_a_coefficient():
    control = L0Controller(2.0, 0.0, 8.0)
    control(codes(64), at(0))
    first, state = float(control(codes(70), at(1))), control.state.clone()
    assert float(control(codes(500), at(1))) == first and torch.equal(control.state, state)
    assert float(control(codes(500), at(2))) > first


def test_a_batch_without_codes_lowers_it_and_breaks_nothing():
    control = L0Controller(2.0, 0.0, 8.0)
    for step in range(30):
        coefficient = float(control(codes(0), at(step)))
    assert 0 < coefficient < 2


@pytest.mark.parametrize(("l0", "bound"), [(0.5, 0.2), (4000, 60)])
def test_it_does_not_wind_up(l0, bound):
    """However long L0 stays away, the integral goes no further than to a tenth or 30 times the start."""
    control = L0Controller(2.0, 0.0, 32.0)
    for step in range(900):
        control(codes(l0, 10), at(step, 1000))
    assert math.exp(control.state[0].item()) == pytest.approx(bound, rel=1e-4)


def test_it_rests_at_the_end():
    control = L0Controller(2.0, 0.0, 8.0)
    moves = []
    for step in range(400):
        before = control.state[0].item()
        control(codes(8.2), at(step, 400))  # a little off all the time
        moves.append(abs(control.state[0].item() - before))
    assert moves[-1] < 0.05 * max(moves) and moves[300] > 0.9 * max(moves)


@pytest.mark.parametrize("n_steps", [400, 1000])
@pytest.mark.parametrize("lag", [5, 40])
def test_a_lagging_l0_arrives_and_stays(n_steps, lag):
    """log L0 follows `5.5 - 0.7 log coefficient` with a lag, from far above and under noise of 2 %."""
    control, log_l0 = L0Controller(1.0, 0.05, 32.0), math.log(2000)
    noise, seen = torch.randn(n_steps, generator=torch.Generator().manual_seed(0)), []
    for step in range(n_steps):
        l0 = math.exp(log_l0 + 0.02 * noise[step].item())
        coefficient = float(control(codes(min(l0, 4096), 100), at(step, n_steps)))
        log_l0 += (5.5 - 0.7 * math.log(coefficient) - log_l0) / lag
        seen.append(math.exp(log_l0))
    assert all(abs(l0 / 32 - 1) < 0.05 for l0 in seen[-n_steps // 10 :])
    assert min(seen) > 24  # it never shoots far past


def planted(n=4000, d_in=16, seed=0):
    """Sparse sums of 32 planted directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(32, d_in, generator=generator)
    fires = torch.rand(n, 32, generator=generator) < 0.1
    return (torch.rand(n, 32, generator=generator) * fires) @ directions + 1.5


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


CONFIGS = [ReLUConfig(64, target_l0=4.0), JumpReLUConfig(64, target_l0=4.0), GatedConfig(64, target_l0=4.0)]
names = pytest.mark.parametrize("config", CONFIGS, ids=["relu", "jumprelu", "gated"])


@names
def test_l0_arrives_on_planted_features(tmp_path, config):
    train_config = TrainConfig(n_tokens=400 * 256, batch_size=256, checkpoint_every=0, log_every=1)
    sae = train(config, planted(), train_config, tmp_path / "sae", progress=False)
    lines = metrics(tmp_path / "sae")
    last = [line["l0"] for line in lines[-40:]]
    assert sum(last) / 40 == pytest.approx(4, rel=0.05)
    assert lines[0]["l0"] > 8 and lines[-1]["fvu"] < 0.4
    fresh = planted(seed=0)
    assert sae.encode(fresh).nnz / len(fresh) == pytest.approx(4, rel=0.1)


@names
def test_it_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path, monkeypatch, config):
    x = planted(2000)
    small = TrainConfig(n_tokens=64 * 40, batch_size=64, warmup_steps=5, checkpoint_every=10, log_every=5)
    whole = train(config, x, small, tmp_path / "whole", progress=False)
    real = sae_run.Run.train_step

    def stops(self, rows):
        if self.step == 27:
            raise KeyboardInterrupt
        real(self, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sae_run.Run, "train_step", stops)
        train(config, x, small, tmp_path / "cut", progress=False)
    assert train(config, x, small, tmp_path / "cut", progress=False).hash == whole.hash
    assert metrics(tmp_path / "cut")[-1]["coefficient"] == metrics(tmp_path / "whole")[-1]["coefficient"]


def test_the_quiet_level_lets_eight_times_the_target_fire():
    """Of 4096 normal numbers 256 exceed 1.534; half of them at most are let through."""
    assert l0_controller.quiet_level(4096, 32) == pytest.approx(1.5341, abs=1e-4)
    assert l0_controller.quiet_level(8, 4) == 0
    x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0)) * 5 + 2
    for name, config in (("relu", ReLUConfig), ("jumprelu", JumpReLUConfig), ("gated", GatedConfig)):
        sae = VARIANTS[name](config(1024, target_l0=4.0), 64)
        sae.set_normalization(x.mean(0), float(x.square().sum(1).mean()))
        assert sae.encode(x).nnz / len(x) == pytest.approx(32, rel=0.1), name
    assert not VARIANTS["relu"](ReLUConfig(64, target_l0=4.0, normalize="none"), 8).b_enc.any()


def test_bad_configs_name_the_value():
    bad: list[tuple[dict[str, Any], str]] = [
        ({"target_l0": 0.0}, "target_l0=0"),
        ({"target_l0": 17.0}, "target_l0=17.*d_sae=16"),
        ({"target_l0": 4.0, "l1_coefficient": 0.0}, "l1_coefficient=0.*target_l0=4"),
    ]
    for values, says in bad:
        with pytest.raises(ValueError, match=says):
            ReLUConfig(16, **values)
