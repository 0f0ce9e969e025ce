"""CSR: its loss against a dense formula, one view and two, retrieval by its codes."""

import math

import pytest
import torch
from tiny_saes import D_IN, D_SAE, build, config_of, info, rows

from saelab import TrainConfig, train
from saelab.distributed import SINGLE_PROCESS
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import info_nce
from saelab.saes import Batch, CSRConfig, TopKConfig, TopKSAE
from saelab.saes.csr import kept_coordinates


def dense_codes(sae, x, k):
    u = (x - sae.b_dec) @ sae.W_dec.T + sae.b_enc
    best = u.topk(k, dim=1)
    return torch.zeros_like(u).scatter(1, best.indices, best.values.relu())


def dense_info_nce(z, view, temperature):
    z, view = (one / one.norm(dim=1, keepdim=True) for one in (z, view))
    s = (z @ view.T / temperature).exp()
    return -(s.diag() / s.sum(1)).log().mean()


@pytest.mark.parametrize("views", ["one", "two", "dropout", "two with dropout"])
def test_loss_and_gradients_are_those_of_the_dense_formula(views):
    """MSE(k) + MSE(4k)/8 + auxk/32 + 0.1 InfoNCE, all as fractions of the variance, in float64."""
    sae = build("csr", k=3, view_dropout=0.25 if "dropout" in views else 0.0).double()
    raw, dead = rows(40).double(), torch.zeros(D_SAE, dtype=torch.bool)
    other = rows(40, 1).double() if "two" in views else raw
    dead[:3] = True
    with torch.no_grad():
        sae.b_enc[:3] -= 20
    sae.zero_grad()
    loss = sae.loss(Batch(raw, other), info(dead))
    loss.total.backward()
    got = {name: one.grad for name, one in sae.named_parameters()}
    sae.zero_grad()
    x, view = sae.normalize(raw), sae.normalize(other)
    if "dropout" in views:
        kept = kept_coordinates(40, D_IN, 0.25, 10, SINGLE_PROCESS)
        assert 0.6 < float(kept.mean()) < 0.9
        view = sae.b_dec + (view - sae.b_dec) * kept / 0.75
    z, spread = dense_codes(sae, x, 3), (x - x.mean(0)).square().sum()
    residual = z @ sae.W_dec + sae.b_dec - x
    wide = dense_codes(sae, x, 12) @ sae.W_dec + sae.b_dec - x
    u = (x - sae.b_dec) @ sae.W_dec[:3].T + sae.b_enc[:3]
    rest = -residual.detach()
    auxk = (u.relu() @ sae.W_dec[:3] - rest).square().sum() / (rest - rest.mean(0)).square().sum()
    contrast = dense_info_nce(z, z if views == "one" else dense_codes(sae, view, 3), 0.2)
    total = (residual.square().sum() + wide.square().sum() / 8) / spread + auxk / 32 + 0.1 * contrast
    torch.testing.assert_close(loss.terms["info_nce"], contrast)
    torch.testing.assert_close(loss.total, total)
    torch.testing.assert_close(loss.residual, residual.detach())
    total.backward()
    for name, one in sae.named_parameters():
        torch.testing.assert_close(got[name], one.grad, rtol=1e-9, atol=1e-9)


def test_of_one_view_the_positive_is_1_and_the_term_only_repels():
    """log(1 + sum_neg exp((s_neg - 1) / 0.2)), the identity of section 20.2."""
    z = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)).double()
    s = torch.nn.functional.cosine_similarity(z[:, None], z[None], dim=2)
    negatives = ((s - 1) / 0.2).exp().masked_fill(torch.eye(6, dtype=torch.bool), 0)
    once = SparseActs.from_dense(z)
    torch.testing.assert_close(info_nce(once, once, 0.2), torch.log1p(negatives.sum(1)).mean())


def test_it_falls_as_rows_become_orthogonal():
    def of(dense):
        once = SparseActs.from_dense(dense.double())
        return float(info_nce(once, once, 0.2))

    same, half, apart = torch.ones(4, 4), torch.ones(4, 4) + 2 * torch.eye(4), torch.eye(4)
    assert of(same) == pytest.approx(math.log(4)) and of(same) > of(half) > of(apart)
    assert of(apart) == pytest.approx(math.log(1 + 3 * math.exp(-5)))
    assert of(torch.zeros(4, 4)) == pytest.approx(math.log(4))  # cosine 0 with all, itself included


def test_a_row_without_features_has_finite_gradients():
    dense = torch.tensor([[1.0, 0, 2], [0, 0, 0], [0, 1, 1]])
    found = SparseActs.from_dense(dense)
    values = found.values.clone().requires_grad_()
    info_nce(found.with_values(values), found.with_values(values), 0.2).backward()
    assert values.grad is not None and bool(values.grad.isfinite().all()) and bool(values.grad.any())


def test_encoder_and_decoder_are_one_and_it_encodes_as_topk():
    sae = build("csr")
    assert sae.W_enc is sae.W_dec
    assert [name for name, _ in sae.named_parameters()] == ["W_dec", "b_enc", "b_dec"]
    topk = TopKSAE(TopKConfig(D_SAE, 5), D_IN)
    topk.load_state_dict(sae.state_dict() | {"W_enc": sae.W_dec})
    found = sae.encode(rows(30))
    assert torch.equal(found.to_dense(), topk.encode(rows(30)).to_dense()) and found.counts.tolist() == [5] * 30
    assert torch.equal(sae(rows(30)).x_hat, topk(rows(30)).x_hat)


def test_a_second_view_of_tensors_reaches_training_and_must_fit():
    x = rows(600)
    config, steps = config_of("csr", normalize="scale", contrast=10.0), TrainConfig(n_tokens=600, batch_size=60)

    def trained(data):
        return train(config, data, steps, progress=False)

    alike, noisy = trained(x), trained(Batch(x, x.flip(0)))
    assert alike.hash != noisy.hash and torch.equal(alike.scale, noisy.scale)
    torch.testing.assert_close(trained(Batch(x, x.clone())).W_dec, alike.W_dec, rtol=0, atol=1e-3)  # one view, twice
    assert float((noisy.W_dec - alike.W_dec).detach().abs().max()) > 0.01
    assert not noisy.provenance.origin
    with pytest.raises(ValueError, match=r"second view must have the shape of the rows, \(600, 12\); y is \(600, 11\)"):
        trained(Batch(x, x[:, 1:]))
    with pytest.raises(ValueError, match="TopKConfig reconstructs its input"):
        train(TopKConfig(D_SAE, 5), Batch(x, x), steps, progress=False)


def test_kept_coordinates_depend_on_the_step_alone():
    halves = [kept_coordinates(20, 6, 0.5, 3, SINGLE_PROCESS.sharing(20)) for _ in range(2)]
    assert torch.equal(*halves) and not torch.equal(halves[0], kept_coordinates(20, 6, 0.5, 4, SINGLE_PROCESS))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k": 17}, "k=17 must be between 1 and d_sae=16"),
        ({"contrast": -1.0}, "contrast=-1.0 must not be negative"),
        ({"auxk_alpha": float("nan")}, "auxk_alpha"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"view_dropout": 1.0}, "view_dropout=1.0 must be at least 0 and below 1"),
        ({"k_aux": 0}, "k_aux=0"),
    ],
)
def test_bad_configs_name_the_value(changes, says):
    with pytest.raises(ValueError, match=says):
        CSRConfig(16, **({"k": 4} | changes))
