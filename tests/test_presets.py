"""CPU presets exist for every variant, and a run with one starts."""

import pytest
import torch
from tiny_saes import data

from saelab import TrainConfig, presets, train
from saelab.saes import VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_cpu_preset(name):
    config = presets.cpu(name)
    assert type(config) is VARIANTS[name].Config and config.d_sae == 4096
    small = presets.cpu(name, d_sae=64, **({"k": 4} if hasattr(config, "k") else {}))
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    assert train(small, data(name, x), TrainConfig(n_tokens=640, batch_size=64), progress=False).d_sae == 64


@pytest.mark.parametrize("name", [name for name, one in VARIANTS.items() if hasattr(one.Config, "encoder_decay")])
@pytest.mark.parametrize(("n_tokens", "decay"), [(1_000_000, 1.0), (4_000_000, 1.0), (4_000_001, 0.0), (10**9, 0.0)])
def test_the_encoder_decays_in_short_runs_alone(name, n_tokens, decay):
    assert presets.cpu(name, n_tokens=n_tokens).encoder_decay == decay
    assert presets.cpu(name).encoder_decay == 1.0


def test_changes_go_before_the_preset():
    assert presets.cpu("topk", encoder_decay=0.0, k=8).encoder_decay == 0.0
    assert presets.cpu("topk", n_tokens=10**8, encoder_decay=0.5).encoder_decay == 0.5
    with pytest.raises(ValueError, match="n_tokens=0"):
        presets.cpu("topk", n_tokens=0)


def test_an_unknown_variant_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'batch_topk'"):
        presets.cpu("batchtopk")
