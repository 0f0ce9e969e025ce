"""Adam: torch's arithmetic, weight decay of the encoder alone, and moments that do not sink to denormal numbers."""

import pytest
import torch

from saelab.saes import TopKConfig, TopKSAE
from saelab.training.adam import Adam, default_eps


def test_only_the_encoder_decays_and_as_in_adamw():
    sae = TopKSAE(TopKConfig(64, 4, encoder_decay=0.5), 16)
    adam, before = Adam(sae.parameters(), sae.weight_decay), {name: p.clone() for name, p in sae.named_parameters()}
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step(0.1)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if name == "W_enc" else 1.0), rtol=1e-6, atol=0)
    assert not TopKSAE(TopKConfig(64, 4), 16).weight_decay


def test_adam_is_torchs_adam_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    ours = [
        torch.nn.Parameter(torch.randn(7, 3, generator=generator)),
        torch.nn.Parameter(torch.randn(5, generator=generator)),
    ]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    adam, reference = Adam(ours), torch.optim.Adam(theirs, lr=0.01, fused=True)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            gradient = torch.randn(a.shape, generator=generator)
            a.grad, b.grad = 4.0**step * gradient, gradient  # a constant scale Adam would not notice
        adam.step(0.01, grad_scale=4.0**step)
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step


def test_moments_of_what_no_longer_fires_become_zero_and_move_no_weight():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(6, 3, generator=generator))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    adam, reference = Adam(ours), torch.optim.Adam(theirs, lr=0.01, fused=True)
    for step in range(1100):
        gradient = torch.randn(6, 3, generator=generator)
        gradient[:3] *= 1e-18 * (step < 100)  # three features that hardly fired, and then never
        ours[0].grad, theirs[0].grad = gradient, gradient.clone()
        adam.step(0.01)
        reference.step()
    assert torch.equal(ours[0], theirs[0])
    tiny = torch.finfo(torch.float32).tiny
    sunk = reference.state[theirs[0]]
    assert ((sunk["exp_avg"] != 0) & (sunk["exp_avg"].abs() < tiny)).any()
    state = adam.state_dict()
    assert not state["0.exp_avg"][:3].any() and not state["0.exp_avg_sq"][:3].any()
    assert state["0.exp_avg"][3:].all() and state["0.exp_avg_sq"][3:].all()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999), (0.5, 0.0)])
@pytest.mark.parametrize("eps", [1e-8, 6.25e-10, 1e-15])
def test_betas_and_eps_are_torchs(betas, eps):
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(7, 3, generator=generator))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    adam, reference = Adam(ours, betas=betas, eps=eps), torch.optim.Adam(theirs, 0.01, betas, eps, fused=True)
    for _ in range(300):
        gradient = 1e-6 * torch.randn(7, 3, generator=generator)
        gradient[:2] = 0  # never fires: 0 / (0 + eps)
        ours[0].grad, theirs[0].grad = gradient, gradient.clone()
        adam.step(0.01)
        reference.step()
    assert torch.equal(ours[0], theirs[0]) and bool(ours[0].isfinite().all())


@pytest.mark.parametrize(
    ("batch_size", "width", "eps"),
    [(256, 64, 1e-8), (2048, 576, 1e-8), (2048, 1024, 1e-8), (2048, 4096, 2.5e-9), (8192, 4096, 6.25e-10)],
)
def test_eps_shrinks_as_gradients_do(batch_size, width, eps):
    assert default_eps(batch_size, width) == pytest.approx(eps, rel=1e-12)


def test_an_update_does_not_depend_on_the_width_that_an_fvu_divides_by():
    """The same data, `copies` times side by side: gradients of a weight are as many times smaller, updates are the same."""
    moved = []
    for copies in (1, 64):
        weight = torch.nn.Parameter(torch.zeros(4))
        adam = Adam([weight], eps=default_eps(8192, 4096 * copies))
        for _ in range(20):
            weight.grad = torch.full((4,), 2e-9 / copies)
            adam.step(0.01)
        moved.append(weight.detach().clone())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-5, atol=0)
    assert float(moved[0][0]) < -0.1  # 1e-8 would leave it at a fifth of that
