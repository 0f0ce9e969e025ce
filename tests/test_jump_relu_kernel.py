"""`jump_relu`: the four pseudo-derivatives, at points inside and outside the window."""

import torch

from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.jump_relu import jump_relu


def codes(theta, band):
    """Pre-activations 1.0, 1.9, 2.1, 3.0 of four features with threshold 2."""
    x, W_enc = torch.ones(1, 1), torch.tensor([[1.0], [1.9], [2.1], [3.0]])
    return encode_threshold(x, W_enc.requires_grad_(), torch.zeros(4), theta.detach(), band)


def test_forward_and_gradients_by_hand():
    theta = torch.full((4,), 2.0, requires_grad=True)
    acts = codes(theta, 0.25)
    assert acts.features.tolist() == [1, 2, 3]  # 1.9 lies in the band, 1.0 under it
    u = acts.values.detach().requires_grad_()
    z, steps = jump_relu(acts.with_values(u), theta, 0.5)
    torch.testing.assert_close(z.values, torch.tensor([0.0, 2.1, 3.0]))
    assert steps.tolist() == [0, 1, 1]
    z.values.sum().backward(retain_graph=True)
    assert u.grad is not None and theta.grad is not None
    assert u.grad.tolist() == [0, 1, 1]  # H(u - theta), nothing straight through u
    torch.testing.assert_close(theta.grad, torch.tensor([0.0, -4.0, -4.0, 0.0]))  # -(theta / eps) K
    theta.grad = u.grad = None
    steps.sum().backward()
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad, torch.tensor([0.0, -2.0, -2.0, 0.0]))  # -(1 / eps) K
    assert u.grad is None or not bool(u.grad.any())


def test_theta_of_zero_is_relu():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    W_enc, theta = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(50)
    acts = encode_threshold(x, W_enc, torch.zeros(50), theta, 0.01)
    z, _ = jump_relu(acts, theta, 0.02)
    torch.testing.assert_close(z.to_dense(), (x @ W_enc.T).relu())
