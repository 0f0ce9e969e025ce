"""ICFL: rounds of least squares against a dense pursuit, a code without gradient, features that restart, its metrics."""

import pytest
import torch
from tiny_saes import D_IN, D_SAE, build, config_of, info, rows

from saelab.evaluation.selectivity import selectivity
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import ICFLSAE, Batch, ICFLConfig, MatchingPursuitConfig, MatchingPursuitSAE
from saelab.saes.icfl import RESTART_EVERY, like_an_earlier
from saelab.saes.least_squares import cholesky_solve


def made(k=6, per_round=3):
    sae = ICFLSAE(ICFLConfig(D_SAE, k, per_round, normalize="none"), D_IN, seed=1).double()
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.b_dec.copy_(torch.linspace(-0.5, 0.5, D_IN))
    return sae


def dense_pursuit(x, W, b_dec, k, per_round):
    """Token by token, by torch.linalg.lstsq."""
    z = torch.zeros(len(x), len(W), dtype=x.dtype)
    for t, r in enumerate(x - b_dec):
        for first in range(0, k, per_round):
            c = W @ r
            chosen = c.topk(min(per_round, k - first)).indices
            chosen = chosen[c[chosen] > 0]
            a = torch.linalg.lstsq(W[chosen].T, r[:, None]).solution[:, 0]
            z[t, chosen] += a
            r = r - a @ W[chosen]
    return z


@pytest.mark.parametrize(("k", "per_round"), [(5, 5), (6, 2), (7, 3), (4, 1), (9, 4)])
def test_codes_are_those_of_a_dense_pursuit(k, per_round):
    sae, x = made(k, per_round), rows(40).double()
    with torch.no_grad():
        z = dense_pursuit(x, sae.W_dec, sae.b_dec, k, per_round)
        found = sae.encode(x)
        torch.testing.assert_close(found.to_dense(), z, rtol=1e-9, atol=1e-9)
        assert int(found.counts.max()) <= k and bool((found.values < 0).any()) == (per_round > 1)
        torch.testing.assert_close(sae(x).x_hat, z @ sae.W_dec + sae.b_dec)


def test_one_round_leaves_a_residual_orthogonal_to_what_it_chose():
    """Test 2 of the section: the k largest, then least squares."""
    sae, x = made(5, 5), rows(60).double()
    found = sae.encode(x)
    left = (x - sae(x).x_hat).detach()
    assert float((left[found.rows] * sae.W_dec.detach()[found.features]).sum(1).abs().max()) < 1e-12
    u = (x - sae.b_dec) @ sae.W_dec.T
    assert torch.equal((found.to_dense() != 0).sum(1), (u.topk(5).values > 0).sum(1))


def test_more_rounds_never_leave_more():
    x, before = rows(50).double(), None
    for k in range(2, 21, 2):
        error = (x - made(k, 2)(x).x_hat).detach().norm(dim=1)
        assert before is None or bool((error <= before + 1e-12).all())
        before = error


def test_e18_one_feature_per_round_is_matching_pursuit():
    pursuit = MatchingPursuitSAE(MatchingPursuitConfig(D_SAE, 8, normalize="none"), D_IN).double()
    sae, x = made(8, 1), rows(50).double()
    pursuit.load_state_dict(sae.state_dict())
    torch.testing.assert_close(sae.encode(x).to_dense(), pursuit.encode(x).to_dense(), rtol=1e-6, atol=1e-6)


def test_the_code_is_constant_in_the_loss():
    """Test 5 of the section: gradients are those of decoding the same code, and none reaches the pursuit."""
    sae, x = made(), rows(40).double()
    leaf = x.clone().requires_grad_()
    assert not sae.encode(leaf).values.requires_grad
    loss = sae.loss(Batch(x, x), info())
    loss.total.backward()
    W, b_dec = (one.detach().clone().requires_grad_() for one in (sae.W_dec, sae.b_dec))
    z = dense_pursuit(x, W.detach(), b_dec.detach(), 6, 3)
    residual = z @ W + b_dec - x
    fvu = residual.square().sum() / (x - x.mean(0)).square().sum()
    fvu.backward()
    torch.testing.assert_close(loss.total, fvu)
    torch.testing.assert_close(loss.residual, residual.detach())
    for got, want in ((sae.W_dec.grad, W.grad), (sae.b_dec.grad, b_dec.grad)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert [name for name, _ in sae.named_parameters()] == ["W_dec", "b_dec"] and sae.W_enc is sae.W_dec


def test_the_later_of_two_similar_features_restarts():
    """Test 6: afterwards no pair is similar; the same again after an interruption; only every 100 steps."""
    x = rows(40).double()

    def after(step):
        sae = made()
        with torch.no_grad():
            sae.W_dec[[7, 30]] = sae.W_dec[2].clone()
            sae.W_dec[11] = torch.nn.functional.normalize(sae.W_dec[4] + 0.1 * sae.W_dec[5], dim=0)
        before = sae.W_dec.detach().clone()
        sae.loss(Batch(x, x), info()._replace(step=step))
        return before, sae.W_dec.detach()

    before, W = after(RESTART_EVERY)
    assert like_an_earlier(before).nonzero().flatten().tolist() == [7, 11, 30]
    cosine = (W @ W.T).fill_diagonal_(0)
    assert float(cosine.max()) <= 0.9 and not like_an_earlier(W).any()
    assert (before != W).any(1).nonzero().flatten().tolist() == [7, 11, 30]
    torch.testing.assert_close(W.norm(dim=1), torch.ones(D_SAE).double())
    assert torch.equal(after(RESTART_EVERY)[1], W) and not torch.equal(after(2 * RESTART_EVERY)[1], W)
    for step in (0, 1, RESTART_EVERY + 1):
        assert torch.equal(*after(step))


def test_equal_features_share_a_coefficient():
    sae = made(2, 2).float()
    with torch.no_grad():
        sae.W_dec[1] = sae.W_dec[0]
        x = 3 * sae.W_dec[:1] + sae.b_dec
    found = sae.encode(x)
    assert found.features.tolist() == [0, 1] and found.values.sum().item() == pytest.approx(3, rel=1e-3)


def test_small_systems_are_solved():
    A = torch.randn(20, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    A, b = A @ A.mT + 0.1 * torch.eye(6), torch.randn(20, 6).double()
    torch.testing.assert_close(cholesky_solve(A, b), torch.linalg.solve(A, b))


def test_selectivity_by_hand():
    """Three labels of two items; feature 0 is on label a alone, 1 on all items, 2 on half of b and all of c, 3 on none."""
    on = torch.tensor([[1.0, 1, 0, 0], [2, 1, 0, 0], [0, -1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]])
    found = selectivity(SparseActs.from_dense(on), list("aabbcc"))
    assert found.labels == ("a", "b", "c")
    assert found.average.tolist() == [[1, 0, -0.75, 0], [-0.5, 0, 0, 0], [-0.5, 0, 0.75, 0]]
    assert found.maximum.tolist() == [[1, 0, -1, 0], [-1, 0, -0.5, 0], [-1, 0, 0.5, 0]]


def test_selectivity_for_two_labels_is_antisymmetric():
    sae = build("icfl", k=10)
    found = selectivity(sae.encode(rows(60)), torch.arange(60) % 2)
    torch.testing.assert_close(found.average[0], -found.average[1])
    torch.testing.assert_close(found.average, found.maximum)
    assert -1 <= float(found.average.min()) < 0 < float(found.average.max()) <= 1
    for labels in ([0] * 60, [0, 1]):
        with pytest.raises(
            ValueError, match=f"There are {len(labels)} labels, {len(set(labels))} of them different, for 60"
        ):
            selectivity(sae.encode(rows(60)), labels)


@pytest.mark.parametrize(("changes", "says"), [({"k": 0}, "k=0"), ({"per_round": 0}, "per_round=0")])
def test_bad_configs_name_the_value(changes, says):
    with pytest.raises(ValueError, match=says):
        config_of("icfl", **changes)
