"""`encode_topk` against its dense reference: selection, ties, certificate, gradients, bitwise batch independence."""

import pytest
import torch

from saelab.kernels import candidates, error_bounds
from saelab.kernels import encode_topk as module
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.reference.encode_topk import encode_topk as reference
from saelab.kernels.selection_log import log_selections
from saelab.kernels.torch_backend import screen
from saelab.kernels.workspace import WORKSPACE

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


@pytest.fixture(params=["bf16", "working"])
def screen_dtype(request, monkeypatch):
    """Both kinds of screen, whatever this CPU is good at and however few the rows."""
    monkeypatch.setattr(candidates, "fast_bf16", lambda _: request.param == "bf16")
    monkeypatch.setattr(candidates, "MIN_BF16_ROWS", 0)
    return request.param


@pytest.mark.parametrize("score", ["value", "magnitude", "decoder_norm"])
@pytest.mark.parametrize(("batch", "d_in", "d_sae", "k"), SHAPES)
def test_every_screen_and_score_matches_float64(screen_dtype, score, batch, d_in, d_sae, k):
    x, W_enc, b_enc = make(batch, d_in, d_sae, torch.float32, seed=3)
    norms = torch.linspace(0.2, 3.0, d_sae) if score == "decoder_norm" else None
    with log_selections() as log:
        got = encode_topk(x, W_enc, b_enc, k, score, norms)
    want = reference(x.double(), W_enc.double(), b_enc.double(), k, score, None if norms is None else norms.double())
    torch.testing.assert_close(got.to_dense().double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.to_dense() != 0, want != 0)
    assert log.rows == batch == log.certified + log.recomputed


def test_rows_without_certificate_are_selected_again(screen_dtype, monkeypatch):
    """With a margin far too narrow the certificate must fail, and the second look must still be right."""
    x, W_enc, b_enc = make(40, 8, 600, torch.float32)
    want = reference(x.double(), W_enc.double(), b_enc.double(), 5)
    build = module.build_operands
    narrow = lambda *a: (made := build(*a))._replace(margin=made.margin - 0.5)  # noqa: E731
    monkeypatch.setattr(module, "build_operands", narrow)
    with log_selections() as log:
        got = encode_topk(x, W_enc, b_enc, 5)
    assert log.recomputed > 20 and log.recomputed + log.certified == 40
    assert torch.equal(got.to_dense() != 0, want != 0)
    torch.testing.assert_close(got.to_dense().double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("magnitude", [False, True])
def test_the_screen_bounds_every_score(screen_dtype, magnitude):
    """The proof of everything: no score exceeds its entry by more than the error_bound and one rounding of the output."""
    x, W_enc, b_enc = make(64, 48, 300, torch.float32, seed=5)
    x[0], x[1] = 0, 1e4 * x[1]
    W_enc[0], W_enc[1] = 0, 1e-20
    made = candidates.build_operands(x, W_enc, b_enc, magnitude)
    entries = made.a.double() @ made.b.double().T
    entries = entries if made.bias is None else entries + made.bias.double()
    scores = x.double() @ W_enc.double().T + b_enc.double()
    if magnitude:
        entries, scores = entries.abs(), scores.abs()
    assert bool((scores <= entries + made.error_bound.double()[:, None]).all())


@pytest.mark.parametrize("rounded", ["x", "W"])
def test_the_bound_covers_errors_that_all_add_up(rounded):
    """Every element loses almost half a step in the same direction: no error_bound of the bound is left."""
    ones, lossy = torch.ones(64, 48), torch.full((64, 48), 1 + 0.97 * 2.0**-8)
    x, W_enc = (lossy, ones) if rounded == "x" else (ones, lossy)
    made = error_bounds.bf16_operands(x, W_enc, torch.zeros(64), False)
    assert bool((x.double() @ W_enc.double().T <= made.a.double() @ made.b.double().T).all())


def test_the_certificate_holds_when_the_product_is_wrong_within_its_bound(screen_dtype, monkeypatch):
    """Entries that are too large by any amount up to the margin must not change the result."""
    x, W_enc, b_enc = make(90, 16, 700, torch.float32)
    want = encode_topk(x, W_enc, b_enc, 4)
    build = module.build_operands

    def noisy(*a):
        made = build(*a)
        bias = torch.zeros(700) if made.bias is None else made.bias
        shift = 0.05 * torch.rand(700, generator=torch.Generator().manual_seed(0))
        return made._replace(a=made.a.float(), b=made.b.float(), bias=bias + shift, margin=made.margin + 0.02)

    monkeypatch.setattr(module, "build_operands", noisy)
    got = encode_topk(x, W_enc, b_enc, 4)
    assert torch.equal(got.features, want.features) and torch.equal(got.values, want.values)


def test_a_centre_is_subtracted_and_gets_its_gradient():
    x, W_enc, b_enc = make(9, 6, 31)
    center = torch.linspace(-1, 1, 6, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, W_enc, b_enc, center)]
    assert torch.autograd.gradcheck(lambda x, W, b, c: encode_topk(x, W, b, 4, center=c).values, leaves)
    assert torch.equal(
        encode_topk(x, W_enc, b_enc, 4, center=center).values, encode_topk(x - center, W_enc, b_enc, 4).values
    )


def test_unknown_score_and_missing_norms_are_refused():
    x, W_enc, b_enc = make(2, 3, 5)
    with pytest.raises(ValueError, match="score='size' must be one of"):
        encode_topk(x, W_enc, b_enc, 2, "size")
    with pytest.raises(ValueError, match="norms"):
        encode_topk(x, W_enc, b_enc, 2, "decoder_norm")


def test_magnitudes_keep_their_sign():
    acts = encode_topk(torch.tensor([[1.0, -3.0]]), torch.eye(2), torch.zeros(2), 1, "magnitude")
    assert acts.features.tolist() == [1] and acts.values.tolist() == [-3.0]


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_a_token_alone_has_the_same_bits(screen_dtype, dtype):
    x, W_enc, b_enc = make(300, 576, 700, dtype)
    whole = encode_topk(x, W_enc, b_enc, 16).to_dense()
    for row in (0, 17, 299):
        assert torch.equal(encode_topk(x[row : row + 1], W_enc, b_enc, 16).to_dense()[0], whole[row])
    assert torch.equal(encode_topk(x[100:117], W_enc, b_enc, 16).to_dense(), whole[100:117])


@pytest.mark.parametrize("score", ["value", "magnitude"])
@pytest.mark.parametrize(("d_sae", "k"), [(700, 7), (700, 63), (700, 70), (700, 300), (65, 2)])
def test_chunks_of_rows_and_blocks_of_features_change_nothing(screen_dtype, score, d_sae, k, monkeypatch):
    x, W_enc, b_enc = make(50, 12, d_sae, torch.float32)
    want = encode_topk(x, W_enc, b_enc, k, score)
    monkeypatch.setattr(screen, "_BUFFER_BYTES", 1)
    monkeypatch.setattr(screen, "_ROWS", 8)
    monkeypatch.setattr(screen, "_BLOCK", 64)
    monkeypatch.setattr(screen, "_MEMBERS", 4)
    with log_selections() as log:
        got = encode_topk(x, W_enc, b_enc, k, score)
    assert torch.equal(got.values, want.values) and torch.equal(got.features, want.features)
    assert torch.equal(got.offsets, want.offsets) and log.rows == 50
    assert k > 10 or log.candidates < 50 * d_sae / 3  # what only the first, low floors let through is dropped


def test_each_block_has_its_own_maxima(screen_dtype, monkeypatch):
    monkeypatch.setattr(screen, "_BUFFER_BYTES", 1)
    monkeypatch.setattr(screen, "_BLOCK", 64)
    W = torch.arange(1.0, 193.0)[:, None]
    operands = candidates.build_operands(torch.ones(2, 1), W, torch.zeros(192))
    maxima = screen.Screen(operands).maxima
    assert maxima.shape == (2, 12)  # four groups in each of three blocks
    torch.testing.assert_close(maxima[0].view(3, 4).amax(1), torch.tensor([64.0, 128.0, 192.0]), rtol=0.02, atol=0)


def test_the_floor_of_all_blocks_is_that_of_their_best(screen_dtype, monkeypatch):
    """Features ascend in strength: every block raises the floor, and no candidate of an earlier one may stay."""
    x, W_enc = torch.ones(3, 1), torch.arange(1.0, 513.0)[:, None]
    monkeypatch.setattr(screen, "_BUFFER_BYTES", 1)
    monkeypatch.setattr(screen, "_BLOCK", 64)
    with log_selections() as log:
        acts = encode_topk(x, W_enc, torch.zeros(512), 5)
    assert acts.features.tolist() == [507, 508, 509, 510, 511] * 3
    assert log.candidates <= 3 * 20


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


def test_buffers_made_in_inference_mode_serve_outside_too(screen_dtype):
    WORKSPACE.buffers.clear()
    x, W_enc, b_enc = make(70, 12, 90, torch.float32)
    with torch.inference_mode():
        inside = encode_topk(x, W_enc, b_enc, 7)
    outside = encode_topk(x, W_enc.requires_grad_(), b_enc, 7)
    assert torch.equal(inside.values, outside.values.detach())
