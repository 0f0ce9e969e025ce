"""Inputs and settings that the newer kinds of SAE took without a word, or stopped at with a traceback."""

import math

import pytest
import torch

import saelab
from saelab.cli.main import main
from saelab.errors import SaelabError
from saelab.saes import VARIANTS, Batch
from saelab.training.finetune import train_end_to_end

D = 12
SHORT = saelab.TrainConfig(n_tokens=256, batch_size=64, device="cpu", checkpoint_every=0)


@pytest.fixture(scope="module")
def x():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D, D, generator=generator) * torch.logspace(-1, 1, D)
    return torch.randn(400, D, generator=generator) @ mixing


def trained(name, data, **options):
    return saelab.train(VARIANTS[name].Config(32, **options), data, SHORT, progress=False)


def test_the_effect_on_the_loss_is_that_of_the_direction_in_raw_units(x):
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    sae = trained("gradient", Batch(x, x, gradient), k=4, normalize="whiten")
    effect = (gradient.double() @ sae.decoder()[0].detach().double().T).abs()
    torch.testing.assert_close(
        sae.weights_of(gradient).double(), 1 + effect / effect.mean(1, keepdim=True), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(sae.weights_of(1e38 * gradient.sign()), sae.weights_of(gradient.sign()))


@pytest.mark.parametrize("wrong", [torch.full((3, D), math.nan), torch.ones(1, D), torch.ones(3, 5)])
def test_a_gradient_that_does_not_fit_is_refused(x, wrong):
    sae = trained("gradient", Batch(x, x, x), k=4)
    with pytest.raises(ValueError, match=r"must be finite and of the activations' shape, \(3, 12\)"):
        sae.encode_with(x[:3], wrong)
    assert sae.encode_with(x[:3], x[:3].numpy()).nnz == sae.encode_with(x[:3], x[:3]).nnz


@pytest.mark.parametrize("name", ["csr", "gradient", "gba", "matryoshka", "masked_topk"])
def test_a_whitened_sae_has_no_other_format(name, x, tmp_path):
    options = {"matryoshka": {"select": "topk", "k": 4}, "gba": {"target_l0": 4.0}}.get(name, {"k": 4})
    data = Batch(x, x, x) if name == "gradient" else x
    sae = trained(name, data, normalize="whiten", **options)
    with pytest.raises(SaelabError, match="whitens its input"):
        saelab.save_sae(sae, tmp_path / "out", format="sae_lens")


@pytest.mark.parametrize("k", [16, 17, 32])
def test_k_may_exceed_the_features_of_a_layer(x, k):
    two = torch.stack([x, x.flip(1)], 1)
    sae = trained("cross_layer_transcoder", two, k=k, sparsity="topk")
    assert sae.encode(two).nnz <= k * len(two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_orthogonal_pursuit_of_half_weights(x, dtype):
    sae = trained("itda", x, k=4, solver="omp")
    full, half = sae(x).x_hat, sae.to(dtype)(x).x_hat
    assert float((full - half).square().sum() / full.square().sum()) < 0.02


def test_a_size_of_0_is_not_the_default(x, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    assert main(["finetune", str(tmp_path), "--from-scratch", "--d-sae", "0", "--n-tokens", "4096"]) == 2
    assert "d_sae=0" in capsys.readouterr().err


@pytest.mark.parametrize("weights", [(math.inf, 1, 1, 1, 1), (1e39, 1, 1, 1, 1), (1, 1, 1, 1, math.nan)])
def test_weights_of_prefixes_are_finite(weights):
    with pytest.raises(ValueError, match="group_weights"):
        VARIANTS["matryoshka"].Config(64, 4, group_weights=weights)


def test_tokens_of_another_batch_are_refused(x):
    sae = trained("topk", x, k=4, normalize="layer_norm")
    with pytest.raises(ValueError, match="of 400 tokens, and x has 1"):
        sae.decode(sae.encode(x), x[:1])


def test_whitening_needs_rows(tiny_lm):
    config = VARIANTS["topk"].Config(32, 4, normalize="whiten")
    with pytest.raises(ValueError, match="needs rows to whiten by"):
        train_end_to_end(config, "no cache", tiny_lm, SHORT)
