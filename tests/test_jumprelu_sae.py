"""JumpReLU: both losses by hand, the four pseudo-derivatives, and what it is the same as in special cases."""

import math
from typing import Any

import pytest
import torch

from saelab.kernels.dispatch import using
from saelab.saes import (
    Batch,
    BatchTopKConfig,
    BatchTopKSAE,
    JumpReLUConfig,
    JumpReLUSAE,
    ReLUConfig,
    ReLUSAE,
    StepInfo,
)

D_IN, D_SAE = 12, 40


def rows(n, seed=0):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))


def info(dead=None, n=D_SAE):
    return StepInfo(torch.zeros(n, dtype=torch.bool) if dead is None else dead, 99, 100)


def by_hand(decoder=1.0, **changes: Any):
    """Pre-activations 1.0, 1.9, 2.1 and 3.0 for x = 1, thresholds 2, a window of half a unit."""
    config = JumpReLUConfig(4, bandwidth=0.5, initial_threshold=2.0, normalize="none", **changes)
    sae = JumpReLUSAE(config, 1).double()
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0], [1.9], [2.1], [3.0]]))
        sae.W_dec.fill_(decoder)
        sae.log_threshold.fill_(math.log(2))
    return sae, torch.ones(1, 1, dtype=torch.float64)


def gradient(parameter):
    assert parameter.grad is not None
    return parameter.grad


def test_l0_loss_and_gradients_by_hand():
    """z = (0, 0, 2.1, 3), x_hat = 5.1, squared error 4.1 ** 2, two features fire; dL/dz = 8.2 everywhere."""
    sae, x = by_hand(sparsity_coefficient=0.5)
    loss = sae.loss(Batch(x, x), info(n=4))
    assert loss.total.item() == pytest.approx(4.1**2 + 0.5 * 2)
    assert loss.terms["sparsity"].item() == 2 and loss.feature_acts.features.tolist() == [2, 3]
    loss.total.backward()
    # theta: -(theta / eps) 8.2 - 0.5 / eps inside the window, and another theta for the logarithm
    expected = torch.tensor([0.0, 1.0, 1.0, 0.0]).double() * -(4 * 8.2 + 1) * 2
    torch.testing.assert_close(gradient(sae.log_threshold), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(sae.b_enc), torch.tensor([0, 0, 8.2, 8.2]).double(), rtol=1e-6, atol=0)


def test_tanh_loss_by_hand():
    """Decoder norms 0.5, so x_hat = 2.55; features 0 and 1 are dead and lack 1.0 and 0.1."""
    sae, x = by_hand(0.5, loss="tanh", sparsity_coefficient=0.5, tanh_scale=0.25, pre_act_coefficient=0.1)
    dead = torch.tensor([True, True, False, False])
    loss = sae.loss(Batch(x, x), info(dead))
    sparsity = math.tanh(0.25 * 2.1 * 0.5) + math.tanh(0.25 * 3 * 0.5)
    assert loss.terms["sparsity"].item() == pytest.approx(sparsity)
    assert loss.terms["pre_act"].item() == pytest.approx(0.55, rel=1e-6)
    assert loss.total.item() == pytest.approx(1.55**2 + 0.5 * sparsity + 0.1 * 0.55, rel=1e-6)
    loss.terms["pre_act"].backward()
    assert gradient(sae.b_enc).tolist() == [-0.5, -0.5, 0, 0]  # descent raises what is dead
    torch.testing.assert_close(gradient(sae.log_threshold), torch.tensor([1.0, 1.0, 0, 0]).double())  # and lowers theta
    assert "pre_act" not in sae.loss(Batch(x, x), info(n=4)).terms


def test_tanh_sparsity_reaches_the_encoder_and_l0_does_not():
    for kind, reached in (("tanh", True), ("l0", False)):
        sae, x = by_hand(loss=kind)
        sae.loss(Batch(x, x), info(n=4)).terms["sparsity"].backward()
        assert (sae.W_enc.grad is not None and bool(gradient(sae.W_enc).any())) == reached
        assert gradient(sae.log_threshold).tolist()[1] < 0


def test_gradients_are_the_four_formulas_on_random_inputs():
    """H(u - theta) for u; -(theta / eps) K and -(1 / eps) K for theta; nothing from the L0 to u."""
    eps, coefficient, n = 0.4, 0.7, 50
    sae = JumpReLUSAE(
        JumpReLUConfig(D_SAE, bandwidth=eps, sparsity_coefficient=coefficient, normalize="none"), D_IN, seed=1
    ).double()
    x = rows(n).double()
    with torch.no_grad():
        sae.log_threshold.uniform_(-1, 0.5, generator=torch.Generator().manual_seed(2))
        theta, u = sae.threshold, x @ sae.W_enc.T + sae.b_enc
        step, window = (u > theta).double(), ((u - theta).abs() < eps / 2).double()
        to_z = 2 * ((u * step) @ sae.W_dec + sae.b_dec - x) @ sae.W_dec.T / n
    assert bool(window.any()) and not bool(window.all()) and bool((window * step).any()) and bool((window > step).any())
    sae.loss(Batch(x, x), info()).total.backward()
    to_theta = -(window * (theta * to_z + coefficient / n)).sum(0) / eps
    torch.testing.assert_close(gradient(sae.log_threshold), to_theta * theta)
    torch.testing.assert_close(gradient(sae.W_enc), (to_z * step).T @ x)
    torch.testing.assert_close(gradient(sae.b_enc), (to_z * step).sum(0))
    torch.testing.assert_close(gradient(sae.W_dec), (u * step).T @ (2 * ((u * step) @ sae.W_dec - x) / n))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("kind", ["l0", "tanh"])
def test_ste_to_input_lets_the_window_reach_the_pre_activation(kind, backend):
    """dz/du = H + (theta / eps) K and dH/du = K / eps: what the threshold gets, the other way round."""
    grads = []
    for ste in (False, True):
        sae, x = by_hand(loss=kind, ste_to_input=ste, sparsity_coefficient=0.5)
        with using(backend):
            sae.loss(Batch(x, x), info(n=4)).total.backward()
        grads.append((gradient(sae.b_enc), gradient(sae.log_threshold) / 2, gradient(sae.W_enc)))  # theta is 2
    torch.testing.assert_close(grads[1][0] - grads[0][0], -grads[0][1])
    torch.testing.assert_close(grads[1][1], grads[0][1])
    assert grads[1][0][1] != 0 == grads[0][0][1]  # under its threshold, in the window
    torch.testing.assert_close(grads[1][2][:, 0], grads[1][0])  # x is 1


def test_l0_target_loss_by_hand():
    """2 features fire where 3 should: (2 / 3 - 1)^2 times lambda and d_in 1, thresholds fall by 2 (2 / 3 - 1) / 3 of the L0's."""
    sae, x = by_hand(loss="l0_target", target_l0=3.0, sparsity_coefficient=0.5)
    loss = sae.loss(Batch(x, x), info(n=4))
    assert loss.total.item() == pytest.approx(4.1**2 + 0.5 / 9)
    loss.terms["sparsity"].backward()
    of_l0 = torch.tensor([0.0, 1.0, 1.0, 0.0]).double() * -2 * 2  # -theta / eps
    torch.testing.assert_close(gradient(sae.log_threshold), of_l0 * 2 * (2 / 3 - 1) / 3, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="l0_target.*needs target_l0"):
        JumpReLUConfig(4, loss="l0_target")


@pytest.mark.parametrize("kind", ["l0", "tanh", "l0_target"])
@pytest.mark.parametrize("revive", ["auto", "none", "pre_act", "auxk"])
def test_dead_features_come_back_in_any_form(kind, revive):
    sae, x = JumpReLUSAE(JumpReLUConfig(D_SAE, loss=kind, revive=revive, target_l0=3.0), D_IN), rows(60)
    dead = torch.arange(D_SAE) < 3
    with torch.no_grad():
        sae.b_enc[:3] = -1e-3
        sae.log_threshold[:3] = 5.0
    loss = sae.loss(Batch(x, x), info(dead))
    loss.total.backward()
    revival = ("pre_act" if kind == "tanh" else "none") if revive == "auto" else revive
    assert {"pre_act", "auxk"} & set(loss.terms) == {revival} - {"none"}
    assert bool((gradient(sae.W_enc)[:3] != 0).any()) == (revival != "none")
    if revival == "auxk":
        share = loss.terms["auxk"] * (x - x.mean(0)).square().sum() / 60 / 32
        plain = loss.terms["sse"] + loss.terms["coefficient"] * loss.terms["sparsity"]
        torch.testing.assert_close(loss.total, plain + share)


def test_descent_on_the_l0_raises_thresholds():
    sae, x = JumpReLUSAE(JumpReLUConfig(D_SAE, bandwidth=0.2), D_IN), rows(100)
    sae.loss(Batch(x, x), info()).terms["sparsity"].backward()
    u = x @ sae.W_enc.T
    inside = ((u - sae.threshold).abs() < 0.1).any(0)
    assert torch.equal(gradient(sae.log_threshold) < 0, inside) and bool(inside.any())
    assert bool((gradient(sae.log_threshold) <= 0).all())


def test_the_default_window_catches_samples_at_any_width():
    """Normalised inputs of any d_in have pre-activations of the same spread: thresholds must feel their data."""
    for d_in in (16, 256):
        sae, x = JumpReLUSAE(JumpReLUConfig(D_SAE), d_in), 7 * torch.randn(2048, d_in) + 1
        sae.set_normalization(x.mean(0), float(x.square().sum(1).mean()))
        sae.loss(Batch(x, x), info()).total.backward()
        assert bool((gradient(sae.log_threshold) != 0).all())


def test_a_pre_activation_at_its_threshold_does_not_fire():
    sae = JumpReLUSAE(JumpReLUConfig(1, initial_threshold=1.0, normalize="none"), 1)
    with torch.no_grad():
        sae.W_enc.fill_(1)
    x = torch.tensor([[1.0], [math.nextafter(1.0, 2.0) + 1e-6], [0.999999]])
    assert sae.encode(x).to_dense().squeeze(1).tolist() == [0, x[1].item(), 0]


@pytest.mark.parametrize("kind", ["l0", "tanh"])
def test_pairs_in_the_band_that_are_zero_do_not_count_as_fired(kind):
    sae, x = JumpReLUSAE(JumpReLUConfig(D_SAE, loss=kind, bandwidth=1.0, normalize="none"), D_IN), rows(60)
    acts, codes = sae.loss(Batch(x, x), info()).feature_acts, sae.encode(x)
    assert bool((acts.values > sae.threshold[acts.features]).all())
    assert torch.equal(acts.to_dense(), codes.to_dense()) and torch.equal(acts.offsets, codes.offsets)


def test_e9_threshold_zero_is_relu():
    jump, relu = JumpReLUSAE(JumpReLUConfig(D_SAE), D_IN, seed=1), ReLUSAE(ReLUConfig(D_SAE), D_IN, seed=1)
    with torch.no_grad():
        jump.log_threshold.fill_(-torch.inf)
    assert torch.equal(jump.encode(rows(20)).to_dense(), relu.encode(rows(20)).to_dense())


def test_e8_batch_topk_is_a_constant_threshold_between_two_values():
    batch = BatchTopKSAE(BatchTopKConfig(D_SAE, 5), D_IN, seed=1)
    jump, x = JumpReLUSAE(JumpReLUConfig(D_SAE), D_IN, seed=1), rows(30)
    u = (x @ batch.W_enc.T).flatten().sort(descending=True).values
    with torch.no_grad():
        jump.log_threshold.fill_(math.log(float((u[149] + u[150]) / 2)))
    chosen = batch.select(x, info())
    assert chosen.nnz == 150 and torch.equal(jump.encode(x).to_dense(), chosen.to_dense())


def test_codes_scale_with_input_threshold_and_bias():
    sae, x = JumpReLUSAE(JumpReLUConfig(D_SAE, normalize="none"), D_IN), rows(20)
    with torch.no_grad():
        sae.log_threshold.zero_()
        sae.b_enc.normal_(generator=torch.Generator().manual_seed(4))
        before = sae.encode(x).to_dense()
        sae.log_threshold.fill_(math.log(4))
        sae.b_enc.mul_(4)
    torch.testing.assert_close(sae.encode(4 * x).to_dense(), 4 * before, rtol=1e-6, atol=0)
    assert before.count_nonzero() > 20


def test_pre_bias_is_taken_from_the_input():
    plain, biased = (JumpReLUSAE(JumpReLUConfig(D_SAE, pre_bias=on, normalize="none"), D_IN) for on in (False, True))
    with torch.no_grad():
        biased.b_dec.copy_(torch.linspace(-1, 1, D_IN))
    x = rows(20)
    assert torch.equal(biased.encode(x).to_dense(), plain.encode(x - biased.b_dec).to_dense())
    assert not torch.equal(biased.encode(x).to_dense(), plain.encode(x).to_dense())


def test_only_the_l0_form_keeps_decoder_rows_at_norm_1():
    both: list[tuple[Any, float]] = [("l0", 1.0), ("tanh", 5.0)]
    for kind, norm in both:
        sae = JumpReLUSAE(JumpReLUConfig(D_SAE, loss=kind), D_IN)
        with torch.no_grad():
            sae.W_dec.mul_(5)
        sae.after_step()
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((D_SAE,), norm))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"bandwidth": 0.0}, "bandwidth=0"),
        ({"initial_threshold": -1.0}, "initial_threshold=-1"),
        ({"tanh_scale": 0.0}, "tanh_scale=0"),
        ({"pre_act_coefficient": -1.0}, "pre_act_coefficient=-1"),
        ({"sparsity_coefficient": -1.0}, "sparsity_coefficient=-1"),
        ({"sparsity_warmup": 2.0}, "sparsity_warmup=2"),
        ({"target_l0": 17.0}, "target_l0=17.*d_sae=16"),
    ],
)
def test_bad_configs_name_the_value(values, says):
    with pytest.raises(ValueError, match=says):
        JumpReLUConfig(16, **values)
