"""Matching pursuit: a pursuit by hand, the identities of each step, gradients against a dense pursuit."""

import pytest
import torch

from saelab.kernels import decode as kernels_decode
from saelab.kernels import selected_pre_acts
from saelab.kernels.decode import decode
from saelab.saes import (
    AbsTopKConfig,
    AbsTopKSAE,
    Batch,
    MatchingPursuitConfig,
    MatchingPursuitSAE,
    StepInfo,
    matching_pursuit,
)

D_IN, D_SAE = 12, 40


def rows(n, seed=0):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)).double()


def info(dead=None, n=D_SAE):
    return StepInfo(torch.zeros(n, dtype=torch.bool) if dead is None else dead, 10, 100)


def build(k=5, **changes):
    sae = MatchingPursuitSAE(MatchingPursuitConfig(D_SAE, k, normalize="none", **changes), D_IN, seed=1).double()
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.b_dec.copy_(torch.linspace(-0.5, 0.5, D_IN))
    return sae


def plane(k, **changes):
    """Two rows in the plane, (1, 0) and (0.6, 0.8), and x = (1, 1)."""
    sae = MatchingPursuitSAE(MatchingPursuitConfig(2, k, normalize="none", **changes), 2).double()
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    return sae, torch.ones(1, 2, dtype=torch.float64)


def dense_pursuit(x, W, b_dec, k, signed=False, least=0.0):
    """The algorithm in dense PyTorch: codes and residual; it stops where the residual is shorter than `least`."""
    r, z = x - b_dec, torch.zeros(len(x), len(W), dtype=x.dtype)
    for _ in range(k):
        c = r @ W.T
        i = (c.abs() if signed else c).argmax(1)
        a = c.gather(1, i[:, None])
        a = (a if signed else a.relu()) * (r.norm(dim=1, keepdim=True) > least)
        z, r = z.scatter_add(1, i[:, None], a), r - a * W[i]
    return z, r


def gradient(parameter):
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize(
    ("k", "signed", "codes"),
    [
        (1, False, [0, 1.4]),  # 1.4 beats 1; left is (0.16, -0.12)
        (2, False, [0.16, 1.4]),  # left is (0, -0.12), and no row points there
        (9, False, [0.16, 1.4]),
        (3, True, [0.16, 1.4 - 0.096]),  # the same row again: its codes add up
    ],
)
def test_a_pursuit_by_hand(k, signed, codes):
    sae, x = plane(k, signed=signed)
    assert sae.encode(x).to_dense().tolist() == [pytest.approx(codes, abs=1e-6)]


def test_loss_by_hand():
    sae, x = plane(1)
    both = torch.cat([x, -x])  # nothing explains (-1, -1); mean 0, so the variance is 2 + 2
    loss = sae.loss(Batch(both, both), info(n=2))
    assert loss.terms["fvu"].item() == pytest.approx((0.16**2 + 0.12**2 + 2) / 4, rel=1e-6)
    torch.testing.assert_close(loss.residual, torch.tensor([[-0.16, 0.12], [1, 1]]).double(), rtol=0, atol=1e-6)
    assert loss.feature_acts.counts.tolist() == [1, 0]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_codes_are_those_of_a_dense_pursuit(k, signed):
    sae, x = build(k, signed=signed), rows(50)
    codes, _ = dense_pursuit(x, sae.W_dec, sae.b_dec, k, signed)
    acts = sae.encode(x)
    torch.testing.assert_close(acts.to_dense(), codes)
    assert int(acts.counts.max()) <= k
    assert bool((acts.values < 0).any()) == signed


def test_each_step_takes_its_square_from_the_residual():
    """|r|^2 falls by exactly a^2, what is left is orthogonal to the row just taken, and x - b_dec - z W is what is left."""
    sae, x = build(), rows(30)
    before = (x - sae.b_dec).detach()
    for steps in range(1, 9):
        acts, after = sae._pursue(x, steps)
        after = after.detach()
        taken = before - after  # a d_i
        a = taken.norm(dim=1)
        torch.testing.assert_close(after.square().sum(1), before.square().sum(1) - a**2)
        assert float((taken * after).sum(1).abs().max()) < 1e-12
        torch.testing.assert_close(x - decode(acts, sae.W_dec, sae.b_dec), after)
        before = after


def test_more_steps_keep_the_earlier_choices():
    sae, x = build(), rows(30)
    few, many = sae.encode_in_steps(x, 3).to_dense(), sae.encode_in_steps(x, 7).to_dense()
    assert bool(((many != 0) | (few == 0)).all()) and bool((many >= few).all())
    assert torch.equal(sae.encode_in_steps(x, 5).to_dense(), sae.encode(x).to_dense())


def test_an_orthonormal_dictionary_gives_everything_back_and_is_abs_topk():
    x, basis = rows(20), torch.linalg.qr(rows(D_IN, 3)).Q
    for k in (4, D_IN):
        sae = MatchingPursuitSAE(MatchingPursuitConfig(D_IN, k, signed=True, normalize="none"), D_IN).double()
        with torch.no_grad():
            sae.W_dec.copy_(basis)
        u = x @ basis.T
        kept = u.abs() >= u.abs().topk(k, 1).values[:, -1:]
        torch.testing.assert_close(sae.encode(x).to_dense(), u * kept)
    torch.testing.assert_close(sae(x).x_hat, x)  # after D_IN steps


def test_e17_one_signed_step_is_abs_topk_of_one():
    pursuit = MatchingPursuitSAE(MatchingPursuitConfig(D_SAE, 1, signed=True), D_IN, seed=1)
    topk = AbsTopKSAE(AbsTopKConfig(D_SAE, 1), D_IN, seed=1)
    x = rows(100).float()
    assert torch.equal(pursuit.encode(x).to_dense(), topk.encode(x).to_dense())


def test_a_token_stops_at_the_threshold_whatever_its_batch():
    """|(1, 1)| = sqrt(2) and |(0.16, -0.12)| = 0.2: thresholds are shares of sqrt(d_in) = sqrt(2)."""
    for share, n_codes in ((1.001, 0), (0.999, 1), (0.2 / 2**0.5 + 1e-3, 1), (0.2 / 2**0.5 - 1e-3, 2)):
        sae, x = plane(5, residual_threshold=share)
        assert sae.encode(x).nnz == n_codes
    sae, x = build(200, residual_threshold=0.4, signed=True), rows(60).float()
    sae = sae.float()
    whole = sae.encode(x)
    assert len(whole.counts.unique()) > 1
    error = (sae(x).x_hat - x).detach().norm(dim=1)
    assert float(error.max()) <= 0.4 * D_IN**0.5
    for row in range(5):
        assert torch.equal(sae.encode(x[row : row + 1]).to_dense(), whole.to_dense()[row : row + 1])


@pytest.mark.parametrize("rules", [1, 2])
@pytest.mark.parametrize("signed", [False, True])
def test_gradients_are_those_of_a_dense_pursuit(signed, rules, monkeypatch):
    """Of residual and codes; by the new rules from one sum over the pairs of all steps."""
    made = []
    for module in (matching_pursuit, kernels_decode, selected_pre_acts):
        real = module.spmm_transposed
        monkeypatch.setattr(module, "spmm_transposed", lambda *args, real=real: made.append(1) or real(*args))
    sae, x, y = build(6, signed=signed, residual_threshold=0.3), rows(40), rows(40, 5)
    leaf, weight = x.clone().requires_grad_(), rows(40 * D_SAE).view(-1)[: 40 * D_SAE].view(40, D_SAE)
    acts, rest = sae._pursue(leaf, 6, rules)
    ((rest + y - x).square().sum() + (acts.to_dense() * weight).sum()).backward()
    assert len(made) == (1 if rules == 2 else 12)
    W, b_dec, dense_x = (t.detach().clone().requires_grad_() for t in (sae.W_dec, sae.b_dec, x))
    codes, _ = dense_pursuit(dense_x, W, b_dec, 6, signed, 0.3 * D_IN**0.5)
    ((dense_x - b_dec - codes @ W + y - x).square().sum() + (codes * weight).sum()).backward()
    for got, want in ((sae.W_dec, W), (sae.b_dec, b_dec), (leaf, dense_x)):
        torch.testing.assert_close(gradient(got), gradient(want))


def test_codes_carry_a_gradient_where_a_row_is_chosen_twice():
    sae, x = plane(3, signed=True)
    sae.encode(x).values.sum().backward()
    W = sae.W_dec.detach().clone().requires_grad_()
    dense_pursuit(x, W, 0.0, 3, True)[0].sum().backward()
    torch.testing.assert_close(gradient(sae.W_dec), gradient(W))


def test_dead_rows_learn_from_what_is_left_and_no_live_one_does():
    sae, x = build(), rows(64)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[3, 8]] = True
    loss = sae.loss(Batch(x, x), info(dead))
    left = -loss.residual
    W = sae.W_dec[[3, 8]]
    c, i = (left @ W.T).max(1)
    expected = (left - c.relu()[:, None] * W[i]).square().sum() / (left - left.mean(0)).square().sum()
    torch.testing.assert_close(loss.terms["auxk"], expected)
    torch.testing.assert_close(loss.total, loss.terms["fvu"] + loss.terms["auxk"] / 32)
    loss.terms["auxk"].backward()
    assert torch.equal(gradient(sae.W_dec).abs().sum(1) > 0, dead) and sae.b_dec.grad is None


def test_there_is_no_encoder():
    sae = build()
    assert [name for name, _ in sae.named_parameters()] == ["W_dec", "b_dec"]
    assert sae.W_enc is sae.W_dec and not hasattr(sae, "b_enc")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"k": 0}, "k=0"),
        ({"residual_threshold": -0.1}, "residual_threshold=-0.1"),
        ({"auxk_alpha": -1.0}, "auxk_alpha=-1"),
    ],
)
def test_bad_configs_name_the_value(values, says):
    with pytest.raises(ValueError, match=says):
        MatchingPursuitConfig(16, **values)
    with pytest.raises(ValueError, match="n_steps=0"):
        build().encode_in_steps(rows(1), 0)
