"""Every variant through `saelab.train`: it learns, its folder loads bit-equal, and a run cut in the middle ends the same."""

import pytest
import torch
from tiny_saes import config_of, data

from saelab import TrainConfig, load_sae, train
from saelab.saes import VARIANTS

SHORT = TrainConfig(n_tokens=128 * 60, batch_size=128, warmup_steps=5, checkpoint_every=20, log_every=5)
D_SAE = 64
LEAST = {"codebook": 0.9, "itda": 0.9, "icfl": 0.7}
"""Codes without magnitudes rebuild less, and a dictionary of activations is full after the first batch; least squares rebuild
much from random features."""


def planted(n: int = 3000, d_in: int = 16) -> torch.Tensor:
    """Sparse signed sums of 32 planted directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(32, d_in, generator=generator)
    codes = torch.rand(n, 32, generator=generator) * (torch.rand(n, 32, generator=generator) < 0.1)
    return codes @ directions + 1.5


@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns_loads_and_resumes_bit_for_bit(tmp_path, name, device):
    x, config, folder = planted(), config_of(name, D_SAE), tmp_path / "sae"
    given = data(name, x)
    sae = train(config, given, SHORT, folder, progress=False)
    untrained = train(config, given, TrainConfig(n_tokens=128, batch_size=128), progress=False)
    there = x.to(device)  # where training went by itself
    error, before = ((one(there).x_hat - there).square().sum().item() for one in (sae, untrained))
    assert error < LEAST.get(name, 0.6) * before
    back = load_sae(folder)
    assert back.hash == sae.hash
    assert torch.equal(back.to(device).encode(there).to_dense(), sae.encode(there).to_dense())
    assert torch.equal(sae.encode(there[7:8]).to_dense(), sae.encode(there).to_dense()[7:8])
    for file in ("sae.json", "sae.safetensors", "golden.safetensors"):
        (folder / file).unlink()  # as if killed after the last checkpoint, which is of step 40
    assert train(config, given, SHORT, folder, progress=False).hash == sae.hash
