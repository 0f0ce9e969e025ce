"""The BatchTopK transcoder: its selection, loss and gradients against a dense formula, a BatchTopK SAE where y is x, folding."""

from functools import partial

import pytest
import tiny_saes
import torch
from tiny_saes import away_from_start, moments

import saelab
from saelab.io import load_sae, save_sae
from saelab.saes import (
    Batch,
    BatchTopKSAE,
    BatchTopKTranscoderConfig,
    BatchTopKTranscoderSAE,
)
from saelab.training import TrainConfig, train

D_IN, D_OUT, D_SAE, K = 6, 4, 20, 3
info = partial(tiny_saes.info, d_sae=D_SAE)


def pairs(n: int, seed: int = 0) -> Batch:
    """y is no linear function of x; float64."""
    x = 2 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mix = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Batch(x + torch.linspace(-1, 3, D_IN), 5 * (x @ mix).relu() - 7)


def build(**changes) -> BatchTopKTranscoderSAE:
    """In float64, with weights moved off 0 and a threshold from one batch."""
    batch = pairs(256, 5)
    sae = BatchTopKTranscoderSAE(BatchTopKTranscoderConfig(D_SAE, K, **changes), D_IN, seed=3, d_out=D_OUT).double()
    away_from_start(sae, batch).loss(batch, info())
    return sae


@pytest.mark.parametrize("skip", [False, True])
def test_loss_and_gradients_are_those_of_the_dense_formula(skip):
    sae, batch, dead = build(skip=skip), pairs(40), torch.arange(D_SAE) < 2
    loss = sae.loss(batch, info(dead))
    loss.total.backward()
    got = {name: one.grad for name, one in sae.named_parameters()}
    sae.zero_grad()
    x, y = sae.normalized(batch)
    u = x @ sae.W_enc.T + sae.b_enc
    kth = u.flatten().sort(descending=True).values[K * len(x) - 1]
    z = u * (u >= kth)
    residual = z @ sae.W_dec + sae.b_dec + (x @ sae.W_skip.T if skip else 0) - y
    fvu = residual.square().sum() / (y - y.mean(0)).square().sum()
    helped, rest = u[:, :2].relu() @ sae.W_dec[:2], -residual.detach()  # at most 3 per token: both
    total = fvu + (helped - rest).square().sum() / (rest - rest.mean(0)).square().sum() / 32
    torch.testing.assert_close(loss.feature_acts.to_dense(), z.detach())
    assert loss.feature_acts.nnz == K * len(x) and len(set(loss.feature_acts.counts.tolist())) > 1
    torch.testing.assert_close(loss.total, total)
    total.backward()
    for name, one in sae.named_parameters():
        torch.testing.assert_close(got[name], one.grad, rtol=1e-9, atol=1e-9)


class NoPreBias(BatchTopKSAE):
    @property
    def pre_bias(self):
        return None


def test_with_y_as_x_it_is_a_batch_topk_sae_without_pre_bias():
    saes = [cls(cls.Config(D_SAE, K), D_IN, seed=3).double() for cls in (NoPreBias, BatchTopKTranscoderSAE)]
    plain, x = saes[0], pairs(50).x
    with torch.no_grad():
        saes[1].W_dec.copy_(plain.W_dec)
    losses = []
    for sae in saes:
        sae.set_normalization(*moments(x))
        losses.append(sae.loss(Batch(x, x), info(torch.arange(D_SAE) < 3)))
        losses[-1].total.backward()
    assert torch.equal(losses[0].total, losses[1].total)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(saes[1].get_parameter(name).grad, parameter.grad)
    assert torch.equal(saes[1].threshold, plain.threshold.expand(D_SAE))
    assert torch.equal(saes[1].encode(x).to_dense(), plain.encode(x).to_dense())


def test_folding_scales_each_threshold_and_changes_no_output(tmp_path):
    sae, x = build(), pairs(60).x
    before, norms, threshold = sae(x), sae.decoder_norms.detach(), sae.threshold.clone()
    assert before.acts.nnz > 0 and len(threshold.unique()) == 1
    sae.fold_decoder_norms()
    after = sae(x)
    torch.testing.assert_close(sae.threshold, threshold * norms)
    assert torch.equal(after.acts.features, before.acts.features) and len(sae.threshold.unique()) > 1
    torch.testing.assert_close(after.x_hat, before.x_hat)
    save_sae(sae, tmp_path, golden_inputs=x)
    assert torch.equal(load_sae(tmp_path)(x).x_hat, sae(x).x_hat)


def test_it_is_exported_as_a_jumprelu_transcoder(tmp_path):
    sae, x = build(skip=True).float(), pairs(60).x.float()
    sae.fold_decoder_norms()
    again = saelab.load_sae(saelab.save_sae(sae, tmp_path, format="sae_lens"))
    assert again.variant == "jumprelu_transcoder" and again.shape == {"d_out": D_OUT}
    torch.testing.assert_close(again(x).x_hat, sae(x).x_hat, rtol=1e-4, atol=1e-4)


def test_after_training_k_features_fire_on_average_though_norms_are_folded():
    batch = Batch(*(part.float() for part in pairs(4000)[:2]))
    options = TrainConfig(n_tokens=128 * 200, batch_size=128, warmup_steps=20)
    sae = train(BatchTopKTranscoderConfig(64, 6), batch, options, progress=False)
    assert isinstance(sae, BatchTopKTranscoderSAE)
    output = sae(batch.x)
    fvu = (output.x_hat - batch.y).square().sum() / (batch.y - batch.y.mean(0)).square().sum()
    assert fvu.item() < 0.15 and output.acts.nnz / 4000 == pytest.approx(6, rel=0.05)
    assert len(sae.threshold.unique()) > 8  # each times its norm
