"""From how many silent tokens on a feature is dead: a rule without cliffs, under which the aux loss acts in most of a run."""

import itertools

import pytest
import torch
from tiny_saes import config_of

from saelab.saes import VARIANTS, CrosscoderConfig, JumpReLUConfig, ReLUConfig, TopKConfig
from saelab.saes.step import RULES
from saelab.training import TrainConfig
from saelab.training.data import open_data
from saelab.training.dead_features import dead_window
from saelab.training.sae_run import Run

LENGTHS = (1_000_000, 9_990_000, 9_999_999, 10_000_000, 20_000_000, 100_000_000)


def window(n_tokens: int, d_sae: int = 4096, k: int = 32, rules: int = RULES, **options) -> int:
    return dead_window(TrainConfig(n_tokens, **options), VARIANTS["topk"], TopKConfig(d_sae, k), rules)


@pytest.mark.parametrize(("d_sae", "k"), [*itertools.product((64, 4096, 16_384, 2**20), (1, 32, 64))])
@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_dead_features_are_helped_in_nine_tenths_of_any_run(n_tokens, d_sae, k):
    found = window(n_tokens, d_sae, k)
    n_steps = n_tokens // 2048
    first = -(-found // 2048)  # the step before which so many tokens were seen
    assert 0 < found <= n_tokens / 10 and (n_steps - first) / n_steps >= 0.9
    assert found == min(400 * d_sae / k, n_tokens // 20)


@pytest.mark.parametrize("d_sae", (4096, 16_384, 2**20))
def test_the_window_grows_without_jumps(d_sae):
    lengths = [*range(100_000, 30_000_000, 99_991), 9_999_999, 10_000_000]
    windows = [window(n, d_sae) for n in sorted(lengths)]
    steps = [b - a for a, b in itertools.pairwise(windows)]
    assert min(steps) >= 0 and max(steps) <= 99_991 / 10
    assert window(10_000_000, d_sae) - window(9_999_999, d_sae) <= 1
    by_width = [window(10**8, width) for width in range(1000, 20_000, 100)]
    assert by_width == sorted(by_width) and len(set(by_width)) == len(by_width)
    assert [window(10**8, 8192, k) for k in (64, 32, 16)] == [51_200, 102_400, 204_800]


@pytest.mark.parametrize(
    ("config", "l0"),
    [
        (TopKConfig(4096, 8), 8),
        (ReLUConfig(4096, target_l0=16.0), 16),
        (ReLUConfig(4096), 32),
        (JumpReLUConfig(4096, target_l0=64.0), 64),
        (CrosscoderConfig(4096, 8), 8),
        (CrosscoderConfig(4096, 8, sparsity="l1", target_l0=20.0), 20),
        (CrosscoderConfig(4096, 8, sparsity="l1"), 32),
        (config_of("codebook", 4096, k=8, n_groups=4), 32),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_the_window_goes_by_the_l0_that_is_asked_for(config, l0):
    variant = next(one for one in VARIANTS.values() if type(config) is one.Config)
    assert dead_window(TrainConfig(10**9), variant, config, RULES) == round(400 * 4096 / l0)


def test_what_was_asked_for_and_what_an_old_run_began_with_stay():
    assert window(10_000_000, dead_after_tokens=7) == 7 == window(10_000_000, dead_after_tokens=7, rules=1)
    assert [window(n, rules=1) for n in (9_999_999, 10_000_000)] == [50_000, 10_000_000]


@pytest.mark.parametrize("name", ["topk", "relu", "batch_topk"])
def test_features_are_dead_in_a_run_after_its_window(name, monkeypatch):
    source = open_data(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), None)
    training = TrainConfig(n_tokens=64 * 40, batch_size=64, device="cpu")
    assert Run(config_of(name, 64), source, training, None, None, rules=1).dead.window == 50_000
    run, seen = Run(config_of(name, 64), source, training, None, None), []
    run.sae.b_enc.data[:5] = -100  # silent from the start
    real = type(run.sae).loss
    monkeypatch.setattr(
        type(run.sae), "loss", lambda sae, batch, info: seen.append(info.dead) or real(sae, batch, info)
    )
    batches = source.batches(["x"], 64, 0, 0)
    for _ in range(4):
        run.train_step(next(batches))
    assert [bool(dead[:5].all()) for dead in seen] == [False, False, True, True]
