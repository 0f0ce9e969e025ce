"""Probes: the regression against gradients and plain numbers, held-out accuracy, bias and units."""

from __future__ import annotations

import pytest
import torch

from saelab.steering import Probe, probe
from saelab.steering.logistic import PENALTIES, fit_logistic, fit_path, logistic_regression

HOOK = "blocks.1.hook_resid_post"
WORDS = ["river", "mill", "house", "hill", "man", "hat", "word", "light", "function", "end"]
POS = [f"The {a} and the {b} are here!" for a in WORDS[:6] for b in WORDS[6:]]
NEG = [f"def {a}({b}): return {b}" for a in WORDS[:6] for b in WORDS[6:]]


@pytest.fixture(scope="module")
def found(tiny_lm):
    return probe(tiny_lm, POS, NEG, HOOK)


@pytest.mark.parametrize("penalty", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("n", [5, 60])
def test_the_regression_is_where_the_gradient_of_its_loss_is_zero(n, penalty):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 7, generator=generator).double()
    y = (x[:, 0] + 0.5 * torch.randn(n, generator=generator) > 0.3).double()
    share = torch.where(y > 0, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    point = logistic_regression(x, y, penalty).requires_grad_()
    log_odds = x @ point[:-1] + point[-1]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(log_odds, y, share, reduction="sum")
    (loss + penalty / 2 * point[:-1].square().sum()).backward()
    assert point.grad is not None and float(point.grad.abs().max()) < 1e-9


def test_a_shift_and_a_unit_of_the_activations_change_nothing():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 50, generator=generator).double(), (torch.arange(30) % 3 > 0).double()
    weight, bias = fit_logistic(x, y, 0.1)
    other, shifted = fit_logistic(100 * x + 7, y, 0.1)
    torch.testing.assert_close((100 * x + 7) @ other + shifted, x @ weight + bias)
    p = torch.sigmoid(x @ weight + bias)
    assert float(p[y > 0].mean() + p[y == 0].mean()) == pytest.approx(1)  # the bias is not penalised


def test_a_path_of_penalties_has_the_fits_of_each_in_the_order_that_was_asked_for():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 50, generator=generator).double(), (torch.arange(30) % 3 > 0).double()
    asked = (1e-2, 10.0, 1e-4)
    weights, biases = fit_path(x, y, asked)
    for penalty, weight, bias in zip(asked, weights, biases, strict=True):
        alone, its_bias = fit_logistic(x, y, penalty)
        torch.testing.assert_close(weight, alone)
        assert float(bias) == pytest.approx(its_bias)
    assert not torch.allclose(weights[0], weights[2])


def test_it_tells_texts_it_has_not_seen_apart(tiny_lm, found):
    assert isinstance(found, Probe) and found.accuracy >= 0.9 and found.n_test == 12
    assert found.penalty in PENALTIES and "held-out texts" in repr(found)
    new = ["The hat and the light are here!", "def hill(end): return end"]
    positive, negative = found.probability(tiny_lm, new).tolist()
    assert positive > 0.5 > negative and found.probability(tiny_lm, new[0]).tolist() == [positive]


def test_bias_and_vector_are_in_raw_units(tiny_lm, found):
    (x,) = next(iter(tiny_lm.stream_activations([POS[0]], [HOOK])))[HOOK]
    odds = found.log_odds(x[1:].mean(0))
    torch.testing.assert_close(torch.sigmoid(odds)[None], found.probability(tiny_lm, POS[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.log_odds(x)[3], x[3] @ found.vector + found.bias)
    mirrored = probe(tiny_lm, NEG, POS, HOOK)
    assert mirrored.vector @ found.vector < 0
    with tiny_lm.steer(found.add(0.1, unit="resid_norm")):
        assert float(found.probability(tiny_lm, NEG[0])) > float(torch.sigmoid(torch.tensor(-20.0)))


def test_it_is_deterministic_and_chance_is_chance(tiny_lm, found):
    again = probe(tiny_lm, POS, NEG, HOOK)
    assert torch.equal(again.vector, found.vector) and again.bias == found.bias
    mixed = POS[:24:2] + NEG[:24:2], POS[1:24:2] + NEG[1:24:2]
    accuracies = [probe(tiny_lm, *mixed, HOOK, seed=seed).accuracy for seed in range(3)]
    assert sum(accuracies) / 3 < 0.85


@pytest.mark.parametrize(
    ("pos", "neg", "options", "said"),
    [
        (POS, NEG[:7], {}, "neg has 7 different texts; a probe needs at least 8"),
        (POS[:7] * 2, NEG, {}, "pos has 7 different texts"),
        ([*POS, "x"], NEG, {}, r"pos\[24\] has no token"),
        (POS, NEG, {"seed": -1}, "seed=-1"),
    ],
)
def test_what_is_refused(tiny_lm, pos, neg, options, said):
    with pytest.raises(ValueError, match=said):
        probe(tiny_lm, pos, neg, HOOK, **options)
