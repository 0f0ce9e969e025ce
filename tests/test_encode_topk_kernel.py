"""`encode_topk` against its dense reference: selection, ties, certificate, gradients, bitwise batch independence."""

import pytest
import torch

from saelab.kernels import encode_topk as module
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.reference.encode_topk import encode_topk as reference

SHAPES = [
    (1, 1, 1, 1),
    (7, 5, 13, 3),
    (33, 24, 257, 31),
    (5, 16, 40, 40),
    (0, 4, 9, 2),
    (64, 576, 1024, 32),
    (3, 3, 11, 10),
]


def make(batch, d_in, d_sae, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make_one = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return make_one(batch, d_in), make_one(d_sae, d_in), make_one(d_sae)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("batch", "d_in", "d_sae", "k"), SHAPES)
def test_matches_the_reference(batch, d_in, d_sae, k, dtype):
    x, W_enc, b_enc = make(batch, d_in, d_sae, dtype)
    got = encode_topk(x, W_enc, b_enc, k)
    want = reference(x, W_enc, b_enc, k)
    assert torch.equal(got.to_dense() != 0, want != 0)
    torch.testing.assert_close(got.to_dense(), want, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert bool((got.counts <= k).all()) and bool((got.values > 0).all())


def test_by_hand():
    x, W_enc = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    acts = encode_topk(x, W_enc, torch.tensor([0.0, 0.0, 0.5, 0.0]), 2)
    assert acts.features.tolist() == [1, 2]
    assert acts.values.tolist() == [2.0, 3.5]


def test_all_negative_rows_keep_nothing():
    acts = encode_topk(torch.ones(4, 3), -torch.ones(20, 3), torch.zeros(20), 5)
    assert acts.nnz == 0 and acts.batch == 4


def test_ties_go_to_the_lowest_id():
    W_enc = torch.ones(50, 3)
    acts = encode_topk(torch.ones(2, 3), W_enc, torch.zeros(50), 4)
    assert acts.features.tolist() == [0, 1, 2, 3] * 2


def test_rows_without_certificate_are_selected_among_all(monkeypatch):
    """With the candidate stage blinded, the certificate must fail and the exact path must still be right."""
    x, W_enc, b_enc = make(6, 8, 60, torch.float32)
    want = reference(x, W_enc, b_enc, 5)
    monkeypatch.setattr(module, "gemm_error", lambda x, *_: torch.full((len(x),), 1e6))
    calls = []
    best_of = module._best_of
    monkeypatch.setattr(module, "_best_of", lambda *a: calls.append(a[3].shape) or best_of(*a))
    assert torch.equal(encode_topk(x, W_enc, b_enc, 5).to_dense() != 0, want != 0)
    assert calls == [(6, 13), (6, 60)]


def test_the_certificate_holds_when_the_dense_product_is_wrong_within_its_bound(monkeypatch):
    """Noise as large as the bound in the dense scores must not change the result."""
    x, W_enc, b_enc = make(20, 16, 300, torch.float32)
    want = encode_topk(x, W_enc, b_enc, 4)
    addmm = torch.addmm
    bound = 0.02
    monkeypatch.setattr(module, "gemm_error", lambda x, *_: torch.full((len(x),), bound))
    noisy = lambda *a: (s := addmm(*a)) + bound * (2 * torch.rand(s.shape) - 1)  # noqa: E731
    monkeypatch.setattr(module.torch, "addmm", noisy)
    got = encode_topk(x, W_enc, b_enc, 4)
    assert torch.equal(got.features, want.features) and torch.equal(got.values, want.values)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_a_token_alone_has_the_same_bits(dtype):
    x, W_enc, b_enc = make(300, 576, 700, dtype)
    whole = encode_topk(x, W_enc, b_enc, 16).to_dense()
    for row in (0, 17, 299):
        assert torch.equal(encode_topk(x[row : row + 1], W_enc, b_enc, 16).to_dense()[0], whole[row])
    assert torch.equal(encode_topk(x[100:117], W_enc, b_enc, 16).to_dense(), whole[100:117])


def test_chunks_change_nothing(monkeypatch):
    x, W_enc, b_enc = make(50, 12, 90, torch.float32)
    want = encode_topk(x, W_enc, b_enc, 7)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 90 * 8)
    got = encode_topk(x, W_enc, b_enc, 7)
    assert torch.equal(got.values, want.values) and torch.equal(got.features, want.features)


def test_gradients_of_every_input():
    x, W_enc, b_enc = (t.requires_grad_() for t in make(5, 4, 17))
    assert torch.autograd.gradcheck(lambda x, W, b: encode_topk(x, W, b, 3).values, (x, W_enc, b_enc))


def test_gradients_match_the_dense_reference():
    inputs = make(9, 6, 31)
    grads = []
    for function in (lambda x, W, b: encode_topk(x, W, b, 4).to_dense(), lambda x, W, b: reference(x, W, b, 4)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        (function(*leaves) ** 2).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
