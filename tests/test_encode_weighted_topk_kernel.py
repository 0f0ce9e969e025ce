"""`encode_weighted_topk` against its dense reference: selection, ties, gradients, a row alone and in a batch."""

import pytest
import torch
from test_encode_topk_kernel import SHAPES, make

from saelab.kernels import encode_weighted_topk as module
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.encode_weighted_topk import encode_weighted_topk
from saelab.kernels.reference.encode_weighted_topk import encode_weighted_topk as reference


def weights_of(batch, d_sae, dtype=torch.float64):
    return torch.randn(batch, d_sae, generator=torch.Generator().manual_seed(7), dtype=torch.float64).abs().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("batch", "d_in", "d_sae", "k"), SHAPES)
def test_matches_the_reference(batch, d_in, d_sae, k, dtype, monkeypatch):
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 4 * d_sae)  # several chunks
    x, W_enc, b_enc = make(batch, d_in, d_sae, dtype)
    weights = weights_of(batch, d_sae, dtype)
    got, want = encode_weighted_topk(x, W_enc, b_enc, k, weights), reference(x, W_enc, b_enc, k, weights)
    assert torch.equal(got.to_dense() != 0, want != 0)
    torch.testing.assert_close(got.to_dense(), want, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert bool((got.counts <= k).all()) and bool((got.values > 0).all())


def test_by_hand():
    x, W_enc = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    acts = encode_weighted_topk(x, W_enc, torch.zeros(4), 2, torch.tensor([[4.0, 0.0, 1.0, 9.0]]))
    assert acts.features.tolist() == [0, 2] and acts.values.tolist() == [1.0, 3.0]  # 4, 0, 3 and a negative


def test_equal_weights_are_topk_and_ties_go_to_the_lowest_id():
    x, W_enc, b_enc = make(33, 24, 257, torch.float32)
    plain = encode_topk(x, W_enc, b_enc, 9, center=x[0])
    same = encode_weighted_topk(x, W_enc, b_enc, 9, torch.full((33, 257), 3.0), center=x[0])
    assert torch.equal(plain.to_dense(), same.to_dense())
    tied = encode_weighted_topk(torch.ones(2, 3), torch.ones(50, 3), torch.zeros(50), 4, torch.ones(2, 50))
    assert tied.features.tolist() == [0, 1, 2, 3] * 2


def test_a_screen_that_is_far_off_changes_nothing(monkeypatch):
    """What is selected is decided by values computed pair by pair: near ties are not left to the dense product."""
    x, W_enc, b_enc = make(40, 64, 300, torch.float32)
    W_enc[1::2] = W_enc[::2] * (1 + 1e-7)
    b_enc[1::2], weights = b_enc[::2], torch.ones(40, 300)
    want = encode_topk(x, W_enc, b_enc, 11)
    assert torch.equal(encode_weighted_topk(x, W_enc, b_enc, 11, weights).to_dense(), want.to_dense())


def test_a_row_is_the_same_alone_and_in_a_batch():
    x, W_enc, b_enc = make(64, 48, 200, torch.float32)
    weights = weights_of(64, 200, torch.float32)
    whole = encode_weighted_topk(x, W_enc, b_enc, 8, weights).to_dense()
    for i in (0, 17, 63):
        assert torch.equal(
            encode_weighted_topk(x[i : i + 1], W_enc, b_enc, 8, weights[i : i + 1]).to_dense()[0], whole[i]
        )


def test_gradients():
    x, W_enc, b_enc = (one.requires_grad_() for one in make(6, 5, 13))
    center = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    weights = weights_of(6, 13)
    of = x, W_enc, b_enc, center
    assert torch.autograd.gradcheck(lambda x, W, b, c: encode_weighted_topk(x, W, b, 3, weights, c).to_dense(), of)
