"""How JumpReLU revives dead features in the fused step: the gradients of autograd, whatever room there is for the features."""

import pytest
import torch
from fused_cases import DEVICE

from saelab.kernels.triton_backend.step import auxk, bucket
from saelab.kernels.triton_backend.step.auxk import Weights
from saelab.kernels.triton_backend.step.gradients import Gradients
from saelab.kernels.triton_backend.step.pre_act import add_pre_act, empty_pre_act

D_SAE, D_IN, WINDOW, WEIGHT = 40, 20, 100, 0.25


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bucket, "_LEAST", 4)


def case(n_dead, n_rows=35):
    generator = torch.Generator().manual_seed(0)
    x, W_enc, W_dec = (torch.randn(n, D_IN, generator=generator).to(DEVICE) for n in (n_rows, D_SAE, D_SAE))
    b_enc, log_theta = (torch.randn(D_SAE, generator=generator).to(DEVICE) for _ in range(2))
    since = torch.zeros(D_SAE, dtype=torch.int64)
    since[torch.randperm(D_SAE, generator=generator)[:n_dead]] = WINDOW
    return x, Weights(W_enc, b_enc, W_dec), log_theta, since.to(DEVICE)


def by_kernels(x, weights, log_theta, since, capacity):
    """Term and gradients, added to gradients of ones, in memory that held NaN."""
    room = empty_pre_act(capacity, WEIGHT, x)
    for memory in (room.shortfalls, room.sums, room.losses):
        memory.fill_(float("nan"))
    gradients, dtheta = Gradients(*(torch.ones_like(weights[at]) for at in (0, 2, 1))), torch.ones_like(log_theta)
    norms = weights.W_dec.norm(dim=1)
    add_pre_act(x, weights, log_theta.exp(), norms, (since, WINDOW), room, gradients, dtheta)
    return room.losses.sum(), *gradients, dtheta


def by_autograd(x, weights, log_theta, since):
    dead = since >= WINDOW
    read = [p.double().requires_grad_() for p in (weights.W_enc, weights.W_dec, weights.b_enc, log_theta)]
    W_enc, W_dec, b_enc, log_theta = (p[dead] for p in read)
    term = ((log_theta.exp() - x.double() @ W_enc.T - b_enc).relu() * W_dec.norm(dim=1)).sum()
    return term.detach(), *(1 + g for g in torch.autograd.grad(WEIGHT * term, read))


@pytest.mark.parametrize(("n_dead", "capacity"), [(0, 16), (5, 16), (17, 32), (40, 40)])
def test_term_and_gradients_are_those_of_autograd(n_dead, capacity):
    data = case(n_dead)
    for got, want in zip(by_kernels(*data, capacity), by_autograd(*data), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


def test_no_bit_depends_on_the_capacity_or_the_slices(monkeypatch):
    data = case(17)
    usual = by_kernels(*data, 32)
    monkeypatch.setattr(auxk, "_MOST", 1)
    assert len(empty_pre_act(40, WEIGHT, data[0]).slices) == 3
    assert all(torch.equal(one, other) for one, other in zip(by_kernels(*data, 40), usual, strict=True))
