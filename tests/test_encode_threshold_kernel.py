"""`encode_threshold` against its dense reference."""

import pytest
import torch

from saelab.kernels import candidates
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.reference.encode_threshold import encode_threshold as reference


def make(batch, d_in, d_sae, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((batch, d_in), (d_sae, d_in), (d_sae,))]


@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(1, 1, 1), (7, 5, 13), (0, 3, 5), (33, 24, 257)])
def test_matches_the_reference(batch, d_in, d_sae, threshold):
    x, W_enc, b_enc = make(batch, d_in, d_sae)
    got, want = encode_threshold(x, W_enc, b_enc, threshold), reference(x, W_enc, b_enc, threshold)
    assert torch.equal(got.to_dense() != 0, want != 0)
    torch.testing.assert_close(got.to_dense(), want, rtol=1e-12, atol=1e-12)


def test_the_threshold_is_strict():
    acts = encode_threshold(torch.tensor([[1.0]]), torch.tensor([[1.0], [2.0], [0.0]]), torch.zeros(3), 1.0)
    assert acts.features.tolist() == [1]
    assert encode_threshold(torch.tensor([[0.0]]), torch.ones(3, 1), torch.zeros(3)).nnz == 0


def test_a_token_alone_has_the_same_bits():
    x, W_enc, b_enc = make(200, 100, 300, torch.float32)
    whole = encode_threshold(x, W_enc, b_enc).to_dense()
    assert torch.equal(encode_threshold(x[50:51], W_enc, b_enc).to_dense()[0], whole[50])


def test_gradients_of_every_input():
    x, W_enc, b_enc = (t.requires_grad_() for t in make(4, 3, 9))
    assert torch.autograd.gradcheck(lambda *a: encode_threshold(*a).values, (x, W_enc, b_enc))


@pytest.fixture(params=["bf16", "working"])
def screen_dtype(request, monkeypatch):
    monkeypatch.setattr(candidates, "fast_bf16", lambda _: request.param == "bf16")
    monkeypatch.setattr(candidates, "MIN_BF16_ROWS", 0)


@pytest.mark.parametrize("band", [0.0, 0.3])
def test_a_threshold_each_feature_and_its_band(screen_dtype, band):
    x, W_enc, b_enc = make(40, 24, 257, torch.float32)
    threshold = torch.linspace(0.1, 6.0, 257)
    got = encode_threshold(x, W_enc, b_enc, threshold, band)
    want = reference(x.double(), W_enc.double(), b_enc.double(), threshold.double(), band)
    assert torch.equal(got.to_dense() != 0, want != 0)
    torch.testing.assert_close(got.to_dense().double(), want, rtol=1e-5, atol=1e-5)


def test_a_band_below_zero_keeps_negative_pre_activations(screen_dtype):
    x, W_enc, b_enc = make(40, 24, 257, torch.float32)
    got = encode_threshold(x, W_enc, b_enc, 0.1, 0.6)
    assert torch.equal(got.to_dense() != 0, reference(x.double(), W_enc.double(), b_enc.double(), 0.1, 0.6) != 0)
    assert bool((got.values < 0).any())
