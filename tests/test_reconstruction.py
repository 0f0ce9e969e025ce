"""Measures of a reconstruction do not depend on where the data's mean lies."""

import pytest
import torch

from saelab.evaluation.reconstruction import Reconstruction
from saelab.saes import ReLUConfig, ReLUSAE

D_IN, GAIN, NOISE = 8, 0.6, 0.3
EXPECTED = {  # of x_hat - mean = 0.6 (x - mean) + noise of variance 0.09
    "fvu": (1 - GAIN) ** 2 + NOISE**2,
    "explained_variance": 1 - (1 - GAIN) ** 2 - NOISE**2,
    "relative_reconstruction_bias": (GAIN**2 + NOISE**2) / GAIN,
}


def scaler(center: torch.Tensor, gain: float) -> ReLUSAE:
    """`x_hat = center + gain (x - center)`: one feature for each direction and sign."""
    sae, eye = ReLUSAE(ReLUConfig(2 * D_IN, normalize="none"), D_IN), torch.eye(D_IN)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye]))
        sae.W_dec.copy_(gain * torch.cat([eye, -eye]))
        sae.center.copy_(center)
    return sae


def measured(offset: float, gain: float, noise: float = 0.0, shift: float = 0.0) -> dict:
    generator = torch.Generator().manual_seed(0)
    x, extra = torch.linalg.qr(torch.randn(4000, 2 * D_IN + 1, generator=generator)).Q[:, 1:].chunk(2, dim=1)
    x, extra = ((part - part.mean(0)) * 4000**0.5 for part in (x, extra))
    mean = offset * torch.randn(D_IN, generator=generator)
    sae = scaler(mean, gain)
    measures = Reconstruction(sae)
    for rows, more in zip((x + mean).split(512), extra.split(512), strict=True):
        output = sae(rows)
        measures.add(rows, output._replace(x_hat=output.x_hat.detach() + noise * more + shift))
    return measures.results()


@pytest.mark.parametrize("offset", [0.0, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("measure", EXPECTED)
def test_a_mean_of_the_data_changes_no_measure(measure, offset):
    assert measured(offset, GAIN, NOISE)[measure] == pytest.approx(EXPECTED[measure], rel=2e-3)


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_a_wrong_mean_is_an_error_and_no_shrinkage(offset):
    found = measured(offset, 1.0, shift=0.5)
    assert found["relative_reconstruction_bias"] == pytest.approx(1, abs=1e-4)
    assert found["fvu"] == pytest.approx(0.25, rel=2e-3)


def test_a_constant_reconstruction_has_no_bias():
    assert measured(10.0, 0.0)["relative_reconstruction_bias"] is None
