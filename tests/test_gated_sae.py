"""Gated: the loss by hand, who gets gradient from which term, and what it is the same as in special cases."""

import math
from typing import Any

import pytest
import torch

from saelab.saes import (
    Batch,
    GatedConfig,
    GatedSAE,
    JumpReLUConfig,
    JumpReLUSAE,
    ReLUConfig,
    ReLUSAE,
    StepInfo,
)

D_IN, D_SAE = 12, 40
INFO = StepInfo(torch.zeros(D_SAE, dtype=torch.bool), 99, 100)


def rows(n, seed=0):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)).double()


def random_gated():
    """Random biases and gains; no normalisation."""
    sae = GatedSAE(GatedConfig(D_SAE, normalize="none"), D_IN, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_mag, sae.r_mag, sae.b_dec):
            parameter.normal_(0, 0.4, generator=generator)
    return sae


def gradient(parameter):
    assert parameter.grad is not None
    return parameter.grad


def test_loss_by_hand():
    """x = 2: gates 2, -1 and 3; magnitudes 2 * 2 + 1 = 5, and 3 - 4 < 0. x_hat = 15 (error 13), frozen 3 * 2 + 3 (error 7)."""
    sae = GatedSAE(GatedConfig(3, l1_coefficient=0.5, normalize="none"), 1).double()
    with torch.no_grad():
        sae.W_enc.fill_(1)
        sae.b_gate.copy_(torch.tensor([0.0, -3.0, 1.0]))
        sae.b_mag.copy_(torch.tensor([1.0, 9.0, -3.0]))
        sae.r_mag.copy_(torch.tensor([2.0, 1.0, 1.0]).double().log())
        sae.W_dec.copy_(torch.tensor([[3.0], [1.0], [1.0]]))
    x = torch.tensor([[2.0]]).double()
    loss = sae.loss(Batch(x, x), StepInfo(torch.zeros(3, dtype=torch.bool), 99, 100))
    assert {name: term.item() for name, term in loss.terms.items()} == pytest.approx(
        {"sse": 13**2, "aux": 7**2, "l1": 5, "coefficient": 0.5}
    )
    assert loss.total.item() == pytest.approx(169 + 49 + 2.5)
    assert loss.feature_acts.features.tolist() == [0] and loss.residual.item() == pytest.approx(13)
    assert sae.encode(x).to_dense().tolist() == [[pytest.approx(5), 0, 0]]


def test_code_is_the_formula():
    sae, x = random_gated(), rows(50)
    a = (x - sae.b_dec) @ sae.W_enc.T
    dense = (a + sae.b_gate > 0) * (a * sae.r_mag.exp() + sae.b_mag).relu()
    torch.testing.assert_close(sae.encode(x).to_dense(), dense)


def test_an_open_gate_without_magnitude_does_not_count_as_fired():
    sae, x = random_gated(), rows(50)
    a = (x - sae.b_dec) @ sae.W_enc.T
    open_gates = int((a + sae.b_gate > 0).sum())
    acts = sae.loss(Batch(x, x), INFO).feature_acts
    assert 0 < acts.nnz < open_gates and bool((acts.values > 0).all())
    assert torch.equal(acts.to_dense(), sae.encode(x).to_dense())


def test_the_reconstruction_says_nothing_to_the_gates_bias():
    sae, x = random_gated(), rows(50)
    sae.loss(Batch(x, x), INFO).terms["sse"].backward()
    assert float(gradient(sae.b_enc).abs().max()) < 1e-12 < float(gradient(sae.b_mag).abs().max())
    for term in ("l1", "aux"):
        sae.zero_grad()
        sae.loss(Batch(x, x), INFO).terms[term].backward()
        assert float(gradient(sae.b_enc).abs().max()) > 1e-3
        assert sae.b_mag.grad is None and sae.r_mag.grad is None


def test_the_aux_loss_leaves_the_decoder_alone():
    """b_dec is also the pre-bias: from there, and only from there, it hears of the aux loss."""
    sae, x = random_gated(), rows(50)
    sae.loss(Batch(x, x), INFO).terms["aux"].backward()
    assert sae.W_dec.grad is None
    torch.testing.assert_close(gradient(sae.b_dec), -(gradient(sae.b_enc) @ sae.W_enc))


def test_e10_equal_biases_and_no_gain_are_relu():
    gated, relu = GatedSAE(GatedConfig(D_SAE), D_IN, seed=1), ReLUSAE(ReLUConfig(D_SAE), D_IN, seed=1)
    with torch.no_grad():
        for bias in (gated.b_enc, gated.b_mag, relu.b_enc):
            bias.copy_(torch.linspace(-0.5, 0.5, D_SAE))
    x = rows(40).float()
    assert torch.equal(gated.encode(x).to_dense(), relu.encode(x).to_dense())


def test_e10_fires_where_both_thresholds_are_passed():
    sae, x = random_gated(), rows(200)
    a = (x - sae.b_dec) @ sae.W_enc.T
    fires = (a > -sae.b_gate) & (a > -sae.b_mag * (-sae.r_mag).exp())
    assert torch.equal(sae.encode(x).to_dense() != 0, fires) and bool(fires.any())


def test_e10_gated_is_jumprelu_where_the_gate_is_the_higher_threshold():
    gated, x = random_gated(), rows(100)
    jump = JumpReLUSAE(JumpReLUConfig(D_SAE, pre_bias=True, normalize="none"), D_IN).double()
    with torch.no_grad():
        theta = torch.linspace(0.1, 1, D_SAE).double()
        gated.b_mag.copy_(gated.r_mag.exp() * gated.b_gate + theta)
        jump.W_enc.copy_(gated.r_mag.exp()[:, None] * gated.W_enc)
        jump.b_enc.copy_(gated.b_mag)
        jump.b_dec.copy_(gated.b_dec)
        jump.log_threshold.copy_(theta.log())
    torch.testing.assert_close(gated.encode(x).to_dense(), jump.encode(x).to_dense())


def test_bad_configs_name_the_value():
    bad: list[tuple[dict[str, Any], str]] = [
        ({"l1_coefficient": -1.0}, "l1_coefficient=-1"),
        ({"l1_warmup": -0.1}, "l1_warmup=-0.1"),
        ({"target_l0": math.nan}, "target_l0=nan"),
    ]
    for values, says in bad:
        with pytest.raises(ValueError, match=says):
            GatedConfig(16, **values)
