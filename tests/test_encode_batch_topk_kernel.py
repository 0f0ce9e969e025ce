"""`encode_batch_topk` and `encode_feature_topk` against their dense references."""

import pytest
import torch

from saelab.kernels import candidates, encode_batch_topk, encode_feature_topk
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.reference.encode_batch_topk import encode_batch_topk as batch_reference
from saelab.kernels.reference.encode_feature_topk import encode_feature_topk as feature_reference
from saelab.kernels.selection_log import log_selections

batch_topk, feature_topk = encode_batch_topk.encode_batch_topk, encode_feature_topk.encode_feature_topk
SHAPES = [(1, 1, 1, 1), (7, 5, 13, 3), (33, 24, 257, 31), (5, 16, 40, 40), (64, 96, 1024, 8), (3, 3, 11, 10)]


@pytest.fixture(params=["bf16", "working"], autouse=True)
def screen_dtype(request, monkeypatch):
    monkeypatch.setattr(candidates, "fast_bf16", lambda _: request.param == "bf16")
    monkeypatch.setattr(candidates, "MIN_BF16_ROWS", 0)
    return request.param


def make(batch, d_in, d_sae, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch + d_sae)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in ((batch, d_in), (d_sae, d_in), (d_sae,))]


def check(got, want):
    assert torch.equal(got.to_dense() != 0, want != 0)
    torch.testing.assert_close(got.to_dense().double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["value", "magnitude", "decoder_norm"])
@pytest.mark.parametrize(("batch", "d_in", "d_sae", "k"), SHAPES)
def test_batch_topk_matches_float64(score, batch, d_in, d_sae, k):
    x, W_enc, b_enc = make(batch, d_in, d_sae)
    norms = torch.linspace(0.5, 2.0, d_sae) if score == "decoder_norm" else None
    want = batch_reference(
        x.double(), W_enc.double(), b_enc.double(), batch * k, score, None if norms is None else norms.double()
    )
    check(batch_topk(x, W_enc, b_enc, batch * k, score, norms), want)


@pytest.mark.parametrize(("batch", "d_in", "d_sae", "k"), SHAPES)
def test_feature_topk_matches_float64(batch, d_in, d_sae, k):
    x, W_enc, b_enc = make(batch, d_in, d_sae)
    places = torch.arange(d_sae) % (batch + 1)
    check(feature_topk(x, W_enc, b_enc, places), feature_reference(x.double(), W_enc.double(), b_enc.double(), places))


@pytest.mark.parametrize("module", [encode_batch_topk, encode_feature_topk])
def test_a_floor_that_was_too_high_is_noticed(module, monkeypatch):
    x, W_enc, b_enc = make(80, 16, 640)
    build = module.build_operands

    def narrow(*a):
        made = build(*a)
        return made._replace(margin=made.margin - 1.0, sizes=(made.sizes[0] - 1.0, made.sizes[1]))

    monkeypatch.setattr(module, "build_operands", narrow)
    with log_selections() as log:
        if module is encode_batch_topk:
            check(batch_topk(x, W_enc, b_enc, 400), batch_reference(x.double(), W_enc.double(), b_enc.double(), 400))
            assert log.recomputed == 80 and log.certified == 0
        else:
            monkeypatch.setattr(module, "build_operands", lambda *a: Shifted(build(*a)))
            places = torch.full((640,), 5)
            got = feature_topk(x, W_enc, b_enc, places)
            check(got, feature_reference(x.double(), W_enc.double(), b_enc.double(), places))
            assert log.recomputed > 300


class Shifted:
    """Operands whose transpose has a margin that is far too narrow."""

    def __init__(self, made):
        self.made = made

    def transposed(self):
        turned = self.made.transposed()
        return turned._replace(margin=turned.margin - 1.0)


def test_by_hand():
    x, W_enc = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2)
    acts = batch_topk(x, W_enc, torch.zeros(2), 1)
    assert acts.to_dense().tolist() == [[0, 0], [0, 2]]
    acts = feature_topk(x, W_enc, torch.tensor([0.5, -3.0]), torch.tensor([2, 1]))
    assert acts.to_dense().tolist() == [[1.5, 0], [0.5, 0]]


def test_ties_go_to_the_earlier_row_and_the_lower_id():
    ones = torch.ones(3, 2), torch.ones(4, 2), torch.zeros(4)
    assert batch_topk(*ones, 6).to_dense().tolist() == [[2, 2, 2, 2], [2, 2, 0, 0], [0, 0, 0, 0]]
    assert feature_topk(*ones, torch.tensor([1, 2, 3, 0])).to_dense().tolist() == [
        [2, 2, 2, 0],
        [0, 2, 2, 0],
        [0, 0, 2, 0],
    ]


def test_identities_between_the_selections():
    """E2, E5 and E8 of the algorithm page."""
    x, W_enc, b_enc = make(1, 24, 300)
    assert torch.equal(batch_topk(x, W_enc, b_enc, 9).to_dense(), encode_topk(x, W_enc, b_enc, 9).to_dense())
    x, W_enc, b_enc = make(40, 24, 300)
    acts = batch_topk(x, W_enc, b_enc, 200)
    assert acts.nnz == 200
    best = (x @ W_enc.T + b_enc).flatten().sort(descending=True).values
    constant = float(best[199] + best[200]) / 2
    assert torch.equal(encode_threshold(x, W_enc, b_enc, constant).to_dense(), acts.to_dense())
    places = torch.arange(300) % 4
    assert feature_topk(x, W_enc, b_enc, places).by_feature.offsets.diff().tolist() == places.tolist()


def test_gradients_of_every_input():
    x, W_enc, b_enc = (t.requires_grad_() for t in make(5, 4, 17, torch.float64))
    assert torch.autograd.gradcheck(lambda x, W, b: batch_topk(x, W, b, 15).values, (x, W_enc, b_enc))
    places = torch.arange(17) % 3
    assert torch.autograd.gradcheck(lambda x, W, b: feature_topk(x, W, b, places).values, (x, W_enc, b_enc))


def test_bad_budgets_are_refused():
    x, W_enc, b_enc = make(5, 4, 17)
    with pytest.raises(ValueError, match="n_kept=86 must be between 0 and"):
        batch_topk(x, W_enc, b_enc, 86)
    with pytest.raises(ValueError, match="capacity ranges from 0 to 6"):
        feature_topk(x, W_enc, b_enc, torch.tensor([6] + [0] * 16))


def test_nothing_kept_and_no_rows():
    x, W_enc, b_enc = make(5, 4, 17)
    assert batch_topk(x, W_enc, b_enc, 0).nnz == 0
    assert feature_topk(x, W_enc, b_enc, torch.zeros(17, dtype=torch.int64)).nnz == 0
    assert batch_topk(x[:0], W_enc, b_enc, 0).batch == 0
    assert feature_topk(x[:0], W_enc, b_enc, torch.zeros(17, dtype=torch.int64)).batch == 0
