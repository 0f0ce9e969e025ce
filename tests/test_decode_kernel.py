"""`decode`, `spmm_transposed` and `sddmm` against their dense references."""

import pytest
import torch

from saelab.kernels.decode import decode, decode_error
from saelab.kernels.primitives import bias_gradient, sddmm, spmm_transposed
from saelab.kernels.reference.decode import decode as decode_reference
from saelab.kernels.sparse_acts import SparseActs


def codes(batch, d_sae, share=0.3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(batch + d_sae)
    dense = torch.randn(batch, d_sae, generator=generator, dtype=dtype)
    return dense * (torch.rand(batch, d_sae, generator=generator) < share)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("batch", "d_sae", "d_in"), [(1, 1, 1), (6, 11, 5), (0, 7, 3), (40, 131, 24)])
def test_forward_and_gradients(batch, d_sae, d_in, share):
    dense = codes(batch, d_sae, share)
    W_dec, b_dec = codes(d_sae, d_in, 1.0), torch.linspace(-1, 1, d_in, dtype=torch.float64)
    g = codes(batch, d_in, 1.0)
    ours, theirs = [
        (dense.clone().requires_grad_(), W_dec.clone().requires_grad_(), b_dec.clone().requires_grad_()) for _ in "ab"
    ]
    got = decode(SparseActs.from_dense(ours[0]), *ours[1:])
    want = decode_reference(SparseActs.from_dense(theirs[0]), *theirs[1:])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got.backward(g)
    want.backward(g)
    assert theirs[0].grad is not None
    torch.testing.assert_close(ours[0].grad, theirs[0].grad * (dense != 0), rtol=1e-12, atol=1e-12)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    acts = SparseActs.from_dense(codes(5, 7))
    W_dec = codes(7, 3, 1.0).requires_grad_()
    values = acts.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, W: decode(acts.with_values(v), W), (values, W_dec))


def test_gradcheck_of_the_error():
    acts = SparseActs.from_dense(codes(5, 7))
    inputs = codes(7, 3, 1.0), codes(1, 3, 1.0)[0], codes(5, 3, 1.0)
    leaves = [t.clone().requires_grad_() for t in (acts.values, *inputs)]
    assert torch.autograd.gradcheck(lambda v, W, b, y: decode_error(acts.with_values(v), W, b, y)[0], leaves)


@pytest.mark.parametrize(("batch", "share"), [(6, 0.3), (0, 0.3), (4, 0.0)])
def test_the_error_is_that_of_decode(batch, share):
    acts = SparseActs.from_dense(codes(batch, 11, share))
    W_dec, b_dec, target = codes(11, 5, 1.0), codes(1, 5, 1.0)[0], codes(batch, 5, 1.0)
    error, residual = decode_error(acts, W_dec.requires_grad_(), b_dec, target)
    torch.testing.assert_close(residual, (decode(acts, W_dec, b_dec) - target).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(error.detach(), residual.square().sum(), rtol=1e-12, atol=1e-12)
    assert error.requires_grad and not residual.requires_grad


def test_several_sources_decode_as_one_by_one():
    """A crosscoder's decoder is `(d_sae, sources, d_in)`."""
    acts = SparseActs.from_dense(codes(6, 11))
    W_dec, b_dec, target = codes(11, 10, 1.0).view(11, 2, 5), codes(2, 5, 1.0), codes(12, 5, 1.0).view(6, 2, 5)
    each = [decode(acts, W_dec[:, i], b_dec[i]) for i in range(2)]
    torch.testing.assert_close(decode(acts, W_dec, b_dec), torch.stack(each, 1), rtol=1e-12, atol=1e-12)
    error, residual = decode_error(acts, W_dec, b_dec, target)
    both = [decode_error(acts, W_dec[:, i], b_dec[i], target[:, i]) for i in range(2)]
    torch.testing.assert_close(error, both[0][0] + both[1][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(residual, torch.stack([both[0][1], both[1][1]], 1), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda W: decode_error(acts, W, b_dec, target)[0], W_dec.clone().requires_grad_())


def test_a_feature_that_fires_on_every_token():
    dense = torch.zeros(50, 9, dtype=torch.float64)
    dense[:, 4] = torch.arange(1, 51)
    g = codes(50, 3, 1.0)
    got = spmm_transposed(SparseActs.from_dense(dense), SparseActs.from_dense(dense).values, g)
    torch.testing.assert_close(got, dense.T @ g)


def test_bias_gradient_sums_by_feature():
    dense = codes(12, 6)
    acts = SparseActs.from_dense(dense)
    torch.testing.assert_close(bias_gradient(acts, acts.values), dense.sum(0))


def test_sddmm():
    x, W = codes(8, 5, 1.0), codes(13, 5, 1.0)
    acts = SparseActs.from_dense(codes(8, 13))
    got = sddmm(x, W, acts.features, acts.offsets)
    torch.testing.assert_close(got, (x[acts.rows] * W[acts.features]).sum(1))


def test_bits_repeat():
    acts, W_dec, g = (
        SparseActs.from_dense(codes(500, 300).float()),
        codes(300, 64, 1.0).float(),
        codes(500, 64, 1.0).float(),
    )
    assert torch.equal(decode(acts, W_dec), decode(acts, W_dec))
    assert torch.equal(spmm_transposed(acts, acts.values, g), spmm_transposed(acts, acts.values, g))
    alone = decode(acts.select_rows(torch.tensor([123])), W_dec)
    assert torch.equal(alone[0], decode(acts, W_dec)[123])
