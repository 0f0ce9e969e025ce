"""Adam: torch's arithmetic, weight decay of the encoder alone, and moments that do not sink to denormal numbers."""

import torch

from saelab.saes import TopKConfig, TopKSAE
from saelab.training.adam import Adam


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
