"""Loss functions on numbers that can be checked by hand."""

import pytest
import torch

from saelab.losses import auxk, fvu, squared_error, total_variance, weighted_l1

X = torch.tensor([[0.0, 0.0], [2.0, 4.0]])


def test_fvu_by_hand():
    """The mean is (1, 2), total variation 2 * (1 + 4) = 10; an error of (1, 0) in one row is 1."""
    x_hat = X + torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert float(fvu(X, x_hat)) == pytest.approx(0.1)
    assert float(fvu(X, X)) == 0
    assert float(fvu(X, X.mean(0).expand_as(X))) == pytest.approx(1)


def test_fvu_counts_a_constant_offset():
    assert float(fvu(X, X + 10)) == pytest.approx(2 * 200 / 10)


def test_squared_error_variance_and_l1_by_hand():
    assert float(squared_error(X, X + 1)) == 4
    assert float(total_variance(X)) == 10
    assert float(total_variance(X[:1])) > 0  # a divisor
    assert float(weighted_l1(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0]), 2)) == 5.5


def test_auxk_without_dead_features_is_zero():
    assert float(auxk(X, X, torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, 2), 4)) == 0


@pytest.mark.parametrize(
    "residual", [torch.zeros(5, 2), torch.full((5, 2), 3.1), X[:1] + 1], ids=["zero", "same", "one row"]
)
@pytest.mark.parametrize("signed", [False, True])
def test_auxk_of_a_residual_that_does_not_vary_is_zero(residual, signed):
    """There is nothing to explain; 0 / 0 and its gradient were 1e38."""
    W = torch.eye(2).requires_grad_()
    got = auxk(torch.randn(len(residual), 2), residual, W, torch.ones(2), W, 2, signed)
    got.backward()
    assert got.item() == 0 and W.grad is not None and not bool(W.grad.any())


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_auxk_does_not_depend_on_the_size_of_a_residual_that_varies(size):
    residual = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    got = auxk(size * residual, size * residual, torch.eye(2), torch.zeros(2), torch.eye(2), 2)
    assert float(got) == pytest.approx(float(fvu(residual, residual.relu())), rel=1e-5)


def test_auxk_ranks_by_norms_where_they_are_given():
    """The first feature has the larger pre-activation, the second the larger effect."""
    x, eye = torch.tensor([[3.0, 2.0], [-1.0, -1.0]]), torch.eye(2)
    norms = torch.tensor([1.0, 2.0])
    got = auxk(x, x, eye, torch.zeros(2), eye * norms[:, None], 1, norms=norms)
    assert float(got) == pytest.approx(float(fvu(x, torch.tensor([[0.0, 4.0], [0.0, 0.0]]))))


def test_auxk_takes_the_k_strongest_dead_features():
    """Two dead features along the axes; with k_aux 1 only the stronger of each row speaks."""
    residual = torch.tensor([[3.0, 1.0], [1.0, 2.0], [-1.0, -5.0]])
    eye = torch.eye(2)
    expected = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    got = auxk(residual, residual, eye, torch.zeros(2), eye, 1)
    assert float(got) == pytest.approx(float(fvu(residual, expected)))
    both = auxk(residual, residual, eye, torch.zeros(2), eye, 2)
    assert float(both) == pytest.approx(float(fvu(residual, residual.relu())))


def test_auxk_of_the_mean_residual_is_one():
    """A dead feature that says the batch mean on every row scores exactly 1."""
    residual = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) + 2
    mean = residual.mean(0)
    got = auxk(torch.zeros(50, 3), residual, torch.zeros(1, 3), torch.ones(1), mean[None], 1)
    assert float(got) == pytest.approx(1, rel=1e-5)


def test_auxk_target_is_detached():
    residual = torch.randn(5, 2, requires_grad=True)
    W = torch.randn(3, 2, requires_grad=True)
    auxk(torch.randn(5, 2), residual, W, torch.ones(3), torch.ones(3, 2), 2).backward()
    assert residual.grad is None and W.grad is not None
