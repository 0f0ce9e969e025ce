"""top-AFA: the number of features that brings the norms together, its loss against a dense formula, its scale, its support."""

from typing import Any

import pytest
import torch
from tiny_saes import D_IN, D_SAE, build, info, rows

from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import Batch, StepInfo, TopAFAConfig, TopAFASAE
from saelab.saes.top_afa import nearest_norm


def dense(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """The feature activations of normalised `x` by trying every number of features of every token."""
    centered = x - sae.b_dec
    u = (centered @ sae.W_enc.T + sae.b_enc).relu()
    z = torch.zeros_like(u)
    for t, row in enumerate(u.detach()):
        order = row.argsort(descending=True)
        gaps = [abs(float(row[order[:m]].norm() - centered[t].detach().norm())) for m in range(1, len(row) + 1)]
        kept = order[: gaps.index(min(gaps)) + 1]
        z[t, kept] = u[t, kept]
    return z


def test_every_number_of_features_tried_gives_the_same():
    sae, x = build("top_afa").double(), rows(60).double()
    with torch.no_grad():
        sae.b_enc += torch.linspace(-1, 1, D_SAE)
    acts = sae.encode(x)
    torch.testing.assert_close(acts.to_dense(), dense(sae, sae.normalize(x)), rtol=1e-12, atol=1e-12)
    assert len(set(acts.counts.tolist())) > 5


@pytest.mark.parametrize(
    ("values", "norm", "kept"),
    [
        ([3.0, 4.0, 12.0], 12.0, [2]),
        ([3.0, 4.0, 12.0], 12.7, [1, 2]),  # norms 12, 12.65, 13
        ([3.0, 4.0, 12.0], 99.0, [0, 1, 2]),
        ([3.0, 4.0], 4.5, [1]),  # 4 and 5 are equally near
        ([3.0, 4.0], 4.6, [0, 1]),
        ([3.0, 4.0], 0.0, [1]),  # at least one
        ([2.0, 2.0, 2.0], 2.8, [0, 1]),  # ties go to the lowest id
        ([], 1.0, []),
    ],
)
def test_by_hand(values, norm, kept):
    one = SparseActs.from_dense(torch.tensor([values, [7.0] * len(values)]))
    found = nearest_norm(one, torch.tensor([norm, 0.0]))
    assert one.where(found).features.tolist() == [*kept, *([0] if values else [])]


@pytest.mark.parametrize("center_norm", [True, False])
def test_loss_and_gradients_are_those_of_the_dense_formula(center_norm):
    sae = build("top_afa", center_norm=center_norm, afa_coefficient=0.25).double()
    raw = rows(40).double()
    x = sae.normalize(raw)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:3] = True
    with torch.no_grad():
        sae.b_enc[:3] -= 20
    loss = sae.loss(Batch(raw, raw), info(dead))
    loss.total.backward()
    got = {name: one.grad for name, one in sae.named_parameters()}
    sae.zero_grad()
    z = dense(sae, x)
    variance = (x - x.mean(0)).square().sum()
    gap = z.norm(dim=1) - (x - sae.b_dec if center_norm else x).norm(dim=1)
    afa = gap.square().mean() / (variance / x.numel())
    fvu = (x - z @ sae.W_dec - sae.b_dec).square().sum() / variance
    torch.testing.assert_close(loss.terms["afa"], afa)
    total = fvu + afa / 4 + loss.terms["auxk"].detach() / 32
    torch.testing.assert_close(loss.total, total)
    total.backward()
    for name, one in sae.named_parameters():
        live = slice(3, None) if len(one) == D_SAE else slice(None)  # the aux loss trains the dead ones
        torch.testing.assert_close(got[name][live], one.grad[live], rtol=1e-9, atol=1e-9)


def test_scaled_inputs_scale_feature_activations_and_keep_the_same():
    sae, x = build("top_afa", "none").double(), rows(30).double()
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.b_enc.zero_()
    one, other = sae.encode(x), sae.encode(5 * x)
    assert torch.equal(one.features, other.features) and torch.equal(one.offsets, other.offsets)
    torch.testing.assert_close(5 * one.values, other.values)


def test_e21_orthonormal_features_come_back_with_the_norm_of_the_input():
    """Identity E21: in halves of +-1, where no product is rounded."""
    signs = torch.tensor([[1.0, 1], [1, -1]])
    features = torch.kron(signs, signs) / 2
    sae = TopAFASAE(TopAFAConfig(4, normalize="none"), 4)
    with torch.no_grad():
        sae.W_enc.copy_(features)
        sae.W_dec.copy_(features)
    z = torch.tensor([[3.0, 0, 4, 0], [0, 2, 0, 0], [1, 1, 1, 1], [0, 5, 3, 1]])
    output = sae(z @ features)
    assert torch.equal(output.acts.to_dense(), z) and torch.equal(output.x_hat, z @ features)
    loss = sae.loss(Batch(z @ features, z @ features), StepInfo(torch.zeros(4, dtype=torch.bool), 1, 10))
    assert float(loss.terms["afa"].detach()) < 1e-12


def test_dropped_features_get_no_gradient():
    sae, x = build("top_afa"), rows(2)
    loss = sae.loss(Batch(x, x + 1), info())
    loss.total.backward()
    fired = torch.zeros(D_SAE, dtype=torch.bool)
    fired[loss.feature_acts.features] = True
    assert torch.equal(sae.W_enc.grad.abs().sum(1) > 0, fired) and not fired.all()


def test_a_token_without_a_positive_pre_activation_fires_nothing():
    sae = build("top_afa")
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    loss = sae.loss(Batch(rows(5), rows(5)), info())
    loss.total.backward()
    assert sae.encode(rows(5)).nnz == 0
    assert sae.b_dec.grad.isfinite().all() and sae.W_enc.shape == (D_SAE, D_IN)


@pytest.mark.parametrize("name", ["afa_coefficient", "auxk_alpha", "encoder_decay"])
def test_a_negative_weight_is_refused(name):
    weight: Any = {name: -1.0}
    with pytest.raises(ValueError, match=f"{name}=-1.0 must not be negative"):
        build("top_afa", **weight)
