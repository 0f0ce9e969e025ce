"""Where training starts: something fires at the first step, whatever the variant, the normalisation and the data's place and
size, or the run is refused; and the data's mean is known from the start."""

from typing import Any

import pytest
import torch
from tiny_saes import config_of, data

from saelab.errors import TrainingError
from saelab.saes import VARIANTS, Batch, JumpReLUConfig, StepInfo
from saelab.saes.config import NORMALIZATIONS
from saelab.saes.token_norm import TOKEN_NORMS
from saelab.training import TrainConfig, train
from saelab.training.data import open_data
from saelab.training.sae_run import Run

D_IN, D_SAE = 16, 64
STEPS = TrainConfig(n_tokens=3 * 128, batch_size=128, device="cpu", log_every=1)
TARGETS = ("relu", "gated", "jumprelu")


def rows(offset, size, n=512):
    """Rows whose mean is `offset` times as long as they vary."""
    generator = torch.Generator().manual_seed(0)
    place = torch.randn(D_IN, generator=generator)
    return size * (torch.randn(n, D_IN, generator=generator) + offset * place / place.square().mean().sqrt())


def started(config, x, steps=STEPS):
    return train(config, x, steps, progress=False)


@pytest.mark.parametrize("size", [0.01, 50.0])
@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("name", VARIANTS)
def test_something_fires_at_the_start(name, normalize, offset, size):
    if name.startswith("cross") and normalize in TOKEN_NORMS:
        return
    target = {"target_l0": 4.0} if name in TARGETS else {}
    x = rows(offset, size)
    sae = VARIANTS[name](config_of(name, D_SAE, normalize=normalize, **target), D_IN)
    moments = x.double().mean(0).float(), x.double().square().sum(1).mean()
    sae.set_normalization(*moments)
    sae.start_from(*moments)
    batch = Batch(x, x)
    loss = sae.loss(batch, StepInfo(torch.zeros(D_SAE, dtype=torch.bool), 0, 100))
    l0 = loss.feature_acts.nnz / len(x)
    assert (0.99 if name == "itda" else 1) < l0 < 40  # one atom explains rows that hardly vary
    if name in TARGETS:
        assert 8 * 4 * 0.7 < l0 < 8 * 4 * 1.3
    if hasattr(sae, "b_dec") and name != "itda":  # whose bias stays 0
        # no reconstruction starts further from the rows than their mean is, by more than its codes
        assert float(loss.residual.square().sum()) < 30 * float((loss.y - loss.y.mean(0)).square().sum())
        exact = normalize not in TOKEN_NORMS  # those start as if all tokens had one size
        bounds: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4 * size} if exact else {"rtol": 0.1, "atol": 0.1}
        torch.testing.assert_close(sae.b_dec.detach().flatten(), loss.y.mean(0), **bounds)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_given_threshold_that_silences_all_is_refused(tmp_path, normalize):
    config = JumpReLUConfig(D_SAE, initial_threshold=9.0, normalize=normalize)
    x = rows(0.0, 1.0)
    with pytest.raises(TrainingError, match=r"Nothing fires at the start.*initial_threshold=9.0.*None"):
        started(config, x)
    started(JumpReLUConfig(D_SAE, initial_threshold=0.525, normalize=normalize), x)
    if normalize == "none":
        with pytest.raises(TrainingError, match=r"initial_threshold=0.525"):
            started(JumpReLUConfig(D_SAE, initial_threshold=0.525, normalize=normalize), x / 100)


def test_jumprelu_learns_without_normalisation():
    """It started at an L0 of 0 and stayed there, at an FVU of 1."""
    steps = TrainConfig(n_tokens=150 * 128, batch_size=128, device="cpu")
    for size in (0.02, 20.0):
        sae = started(JumpReLUConfig(D_SAE, target_l0=6.0, normalize="none"), rows(5.0, size), steps)
        assert sae.provenance.trained["metrics"]["fvu"] < 0.6 and 3 < sae.provenance.trained["metrics"]["l0"] < 24


def test_a_run_of_the_first_rules_starts_where_it_did():
    x = rows(5.0, 1.0)
    for name in VARIANTS:
        config = config_of(name, D_SAE, normalize="scale")
        plain = VARIANTS[name](config, D_IN, seed=STEPS.seed)
        plain.set_normalization(x.double().mean(0).float(), x.double().square().sum(1).mean())
        run = Run(config, open_data(data(name, x), None), STEPS, None, None, rules=1)
        assert run.sae.hash == plain.hash, name
