"""Masked TopK: its loss against a dense formula on the hidden coordinates, masks of the step alone, TopK at inference."""

import pytest
import torch
from tiny_saes import D_IN, D_SAE, build, config_of, info, rows

from saelab.saes import Batch, MaskedTopKConfig, MaskedTopKSAE
from saelab.saes.masked_topk import masks


def test_masks_part_the_coordinates_and_change_with_the_step():
    seen = set()
    for step in range(40):
        hidden, visible = masks(12, 0.25, step)
        assert sorted([*hidden.tolist(), *visible.tolist()]) == list(range(12)) and len(hidden) == 3
        assert torch.equal(hidden, masks(12, 0.25, step)[0])
        seen.add(tuple(hidden.tolist()))
    assert len(seen) > 30 and {i for one in seen for i in one} == set(range(12))
    assert [len(masks(5, fraction, 0)[0]) for fraction in (0.01, 0.5, 0.99)] == [1, 2, 4]


@pytest.mark.parametrize("step", [0, 7])
def test_loss_and_gradients_are_those_of_the_dense_formula(step):
    sae = build("masked_topk", hidden_fraction=1 / 3).double()
    raw, dead = rows(40).double(), torch.zeros(D_SAE, dtype=torch.bool)
    dead[:3] = True
    sae.zero_grad()
    loss = sae.loss(Batch(raw, raw), info(dead, step))
    loss.total.backward()
    got = {name: one.grad for name, one in sae.named_parameters()}
    sae.zero_grad()
    x = sae.normalize(raw)
    hidden = torch.zeros(D_IN, dtype=torch.bool)
    hidden[masks(D_IN, 1 / 3, step)[0]] = True
    u = ((x - sae.b_dec) * ~hidden * D_IN / int((~hidden).sum())) @ sae.W_enc.T + sae.b_enc
    best = u.topk(5, dim=1)
    z = torch.zeros_like(u).scatter(1, best.indices, best.values.relu())
    error = (z @ sae.W_dec + sae.b_dec - x)[:, hidden]
    spread = (x - x.mean(0))[:, hidden].square().sum()
    torch.testing.assert_close(loss.residual, (z @ sae.W_dec + sae.b_dec - x).detach())
    torch.testing.assert_close(loss.terms["fvu_hidden"], error.square().sum() / spread)
    helped = u[:, :3].relu() @ sae.W_dec[:3, hidden]  # at most 6 per token: all three
    assert helped.any()
    rest = -error.detach()
    auxk = (helped - rest).square().sum() / (rest - rest.mean(0)).square().sum()
    total = error.square().sum() / spread + auxk / 32
    torch.testing.assert_close(loss.total, total)
    total.backward()
    for name, one in sae.named_parameters():
        torch.testing.assert_close(got[name], one.grad, rtol=1e-9, atol=1e-9)


def test_hidden_coordinates_do_not_reach_the_encoder():
    sae, x = build("masked_topk", "none"), rows(30)
    hidden, visible = masks(D_IN, 0.25, 3)
    changed = x.clone()
    changed[:, hidden] += 100
    one, other = (sae.loss(Batch(rows, rows), info(step=3)) for rows in (x, changed))
    assert torch.equal(one.feature_acts.to_dense(), other.feature_acts.to_dense())
    assert one.total < other.total
    changed = x.clone()
    changed[:, visible[:1]] += 100
    assert not torch.equal(
        one.feature_acts.to_dense(), sae.loss(Batch(changed, changed), info(step=3)).feature_acts.to_dense()
    )


def test_visible_coordinates_are_not_in_the_loss():
    sae, x = build("masked_topk", "none", auxk_alpha=0.0), rows(30)
    hidden, visible = masks(D_IN, 0.25, 3)
    sae.zero_grad()
    sae.loss(Batch(x, x), info(step=3)).total.backward()
    reached = sae.W_dec.grad.abs().sum(0) > 0
    assert reached[hidden].all() and not reached[visible].any()
    assert not sae.W_enc.grad[:, hidden].any() and sae.W_enc.grad[:, visible].any()


def test_at_inference_it_is_topk():
    sae, topk = build("masked_topk"), build("topk")
    topk.load_state_dict(sae.state_dict())
    assert torch.equal(sae.encode(rows(20)).to_dense(), topk.encode(rows(20)).to_dense())
    assert torch.equal(sae(rows(20)).x_hat, topk(rows(20)).x_hat)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_some_coordinates_are_hidden_and_some_are_not(fraction):
    with pytest.raises(ValueError, match=f"hidden_fraction={fraction} must be between 0 and 1.*variant topk"):
        MaskedTopKConfig(16, 4, hidden_fraction=fraction)
    with pytest.raises(ValueError, match="at least 2 coordinates.*d_in=1"):
        MaskedTopKSAE(config_of("masked_topk"), 1)
