"""Whole runs by the fused steps of other variants than TopK: they end as those by autograd, and resume bit for bit."""

import pytest
import torch
from fused_cases import DEVICE, finish_in_torch

from saelab import TrainConfig, train
from saelab.kernels.dispatch import using
from saelab.saes import BatchTopKConfig, JumpReLUConfig
from saelab.training import fused_step, steps
from saelab.training.fused_step import FusedStep
from saelab.training.metrics_log import read_lines

CONFIGS = {
    "batch_topk": BatchTopKConfig(d_sae=16, k=2),
    "jumprelu": JumpReLUConfig(d_sae=16, target_l0=2.0, loss="tanh", sparsity_coefficient=0.1),
}
SHORT = TrainConfig(
    n_tokens=24, batch_size=6, warmup_steps=2, lr=1e-2, log_every=2, device=DEVICE.type, checkpoint_every=2
)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # numpy runs the kernels, also on memory never written


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fused_step, "dense_pays", lambda d_sae, k: False)
    monkeypatch.setattr(steps, "LAG", 1)
    finish_in_torch(monkeypatch)


def run(config, folder, backend):
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(96, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    with using(backend):
        return train(config, rows, SHORT, folder, progress=False)


def lines(folder):
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_lines(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_run_ends_as_one_by_autograd_and_resumes_bit_for_bit(tmp_path, monkeypatch, config):
    fused, general = run(config, tmp_path / "fused", "triton"), run(config, tmp_path / "general", "torch")
    torch.testing.assert_close(fused.W_dec, general.W_dec, rtol=0, atol=1e-3)
    for ours, theirs in zip(lines(tmp_path / "fused"), lines(tmp_path / "general"), strict=True):
        assert set(ours) == set(theirs)
        assert ours == pytest.approx(theirs, rel=1e-3)
    real = FusedStep.load

    def load(self, x, lr, step):
        if step == 3:
            raise KeyboardInterrupt
        real(self, x, lr, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FusedStep, "load", load)
        run(config, tmp_path / "cut", "triton")
    assert run(config, tmp_path / "cut", "triton").hash == fused.hash
    assert lines(tmp_path / "cut") == lines(tmp_path / "fused")
