"""Transcoders: from one site to another, with and without a linear skip."""

import json
from dataclasses import replace
from functools import partial

import pytest
import tiny_saes
import torch
from test_activation_cache import make_cache
from tiny_saes import away_from_start, interrupt_before, moments

from saelab.errors import TrainingError
from saelab.io import load_sae, save_sae
from saelab.kernels.encode_topk import encode_topk
from saelab.saes import (
    Batch,
    SkipTranscoderConfig,
    SkipTranscoderSAE,
    TopKConfig,
    TopKSAE,
    TranscoderConfig,
    TranscoderSAE,
)
from saelab.saes.trained_hooks import hooks_of
from saelab.training import TrainConfig, train

D_IN, D_OUT, D_SAE = 6, 4, 20
info = partial(tiny_saes.info, d_sae=D_SAE)
BOTH = pytest.mark.parametrize("name", ["transcoder", "skip_transcoder"])
CLASSES = {"transcoder": TranscoderSAE, "skip_transcoder": SkipTranscoderSAE}


def pairs(n: int, seed: int = 0) -> Batch:
    """y is no linear function of x; both have means and sizes of their own."""
    x = 2 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) + torch.linspace(-1, 3, D_IN)
    mix = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(9))
    return Batch(x, 5 * (x @ mix).relu() - 7)


def build(name: str = "transcoder", **changes):
    """Weights moved off 0."""
    cls, batch = CLASSES[name], pairs(256, 5)
    return away_from_start(cls(cls.Config(D_SAE, 4, **changes), D_IN, seed=3, d_out=D_OUT), batch)


def test_prediction_and_loss_by_hand():
    """d_in 1, d_out 2, k 1: z = 3 x of feature 0; y_hat = z (1, -1) + (0, 1); y varies by 16 around its mean."""
    sae = TranscoderSAE(TranscoderConfig(2, 1, normalize="none"), 1, d_out=2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[3.0], [2.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, -1.0], [7.0, 7.0]]))
        sae.b_dec.copy_(torch.tensor([0.0, 1.0]))
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, -2.0], [7.0, -6.0]])
    assert sae(x).x_hat.tolist() == [[3.0, -2.0], [6.0, -5.0]]
    assert sae.loss(Batch(x, y), info(step=0, d_sae=2)).total.item() == (1 + 1) / 16


def test_it_starts_as_the_zero_function_at_the_mean_of_y():
    batch = pairs(500)
    sae = SkipTranscoderSAE(SkipTranscoderConfig(D_SAE, 4), D_IN, d_out=D_OUT)
    sae.set_normalization(*moments(batch.x), *moments(batch.y))
    torch.testing.assert_close(sae(batch.x).x_hat, batch.y.mean(0).expand(500, D_OUT), rtol=1e-4, atol=1e-4)
    assert sae.loss(batch, info()).terms["fvu"].item() == pytest.approx(1, abs=1e-4)
    x, y = sae.normalized(batch)
    for normal, width in ((x, D_IN), (y, D_OUT)):
        assert float(normal.square().sum(1).mean()) == pytest.approx(width, rel=1e-4)
        assert float(normal.mean(0).abs().max()) < 1e-5


def test_e13_with_y_as_x_it_is_an_sae_without_pre_bias():
    transcoder, plain = (
        TranscoderSAE(TranscoderConfig(D_SAE, 4), D_IN, seed=3),
        TopKSAE(TopKConfig(D_SAE, 4), D_IN, seed=3),
    )
    x = pairs(50).x
    for sae in (transcoder, plain):
        sae.set_normalization(*moments(x))
    with torch.no_grad():
        transcoder.W_dec.copy_(plain.W_dec)
        for sae in (transcoder, plain):
            sae.b_enc.fill_(0.1)
    assert torch.equal(transcoder.encode(x).to_dense(), plain.encode(x).to_dense())  # b_dec is 0: no pre-bias to differ
    torch.testing.assert_close(transcoder(x).x_hat, plain(x).x_hat, rtol=1e-6, atol=1e-6)
    losses = [sae.loss(Batch(x, x), info(torch.arange(D_SAE) < 5)).total for sae in (transcoder, plain)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        transcoder.b_dec.fill_(3.0)
        plain.b_dec.fill_(3.0)
    without = encode_topk(plain.normalize(x), plain.W_enc, plain.b_enc, 4)
    assert torch.equal(transcoder.encode(x).to_dense(), without.to_dense())
    assert not torch.equal(plain.encode(x).to_dense(), without.to_dense())


def test_e13_without_its_skip_a_skip_transcoder_is_a_transcoder():
    skip, plain, batch = build("skip_transcoder"), build(), pairs(40)
    with torch.no_grad():
        skip.W_skip.zero_()
        for name, parameter in plain.named_parameters():
            parameter.copy_(skip.get_parameter(name))
    assert torch.equal(skip(batch.x).x_hat, plain(batch.x).x_hat)
    assert torch.equal(skip.loss(batch, info()).total, plain.loss(batch, info()).total)
    with torch.no_grad():
        skip.W_skip.fill_(0.1)
    assert torch.equal(skip.encode(batch.x).to_dense(), plain.encode(batch.x).to_dense())  # it does not count in L0
    assert not torch.allclose(skip(batch.x).x_hat, plain(batch.x).x_hat)


def test_the_loss_is_the_fvu_of_what_forward_gives():
    sae, batch = build("skip_transcoder", auxk_alpha=0.0).double(), Batch(*(part.double() for part in pairs(60)[:2]))
    loss, x_hat = sae.loss(batch, info()), sae(batch.x).x_hat
    fvu = (x_hat - batch.y).square().sum() / (batch.y - batch.y.mean(0)).square().sum()
    assert loss.total.item() == pytest.approx(fvu.item(), rel=1e-9)
    torch.testing.assert_close(loss.residual / sae.scale_out, (x_hat - batch.y).detach())


def test_with_no_feature_active_the_best_skip_is_linear_regression():
    sae, batch = build("skip_transcoder", auxk_alpha=0.0).double(), Batch(*(part.double() for part in pairs(60)[:2]))
    x, y = sae.normalized(batch)
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1, dtype=x.dtype)], 1), y).solution
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
        sae.W_skip.copy_(solved[:-1].T)
        sae.b_dec.copy_(solved[-1])
    loss = sae.loss(batch, info())
    loss.total.backward()
    assert loss.feature_acts.nnz == 0
    for parameter in (sae.W_skip, sae.b_dec):
        assert parameter.grad is not None and float(parameter.grad.abs().max()) < 1e-12
    with torch.no_grad():
        sae.W_skip[0, 0] += 1e-3
    assert sae.loss(batch, info()).total.item() > loss.total.item()


@BOTH
def test_loss_gradient_is_right_in_float64(name):
    plain = build(name, auxk_alpha=0.0).double()
    batch = Batch(*(part.double() for part in pairs(20)[:2]))
    direction = {n: torch.randn_like(p) for n, p in plain.named_parameters()}
    plain.loss(batch, info()).total.backward()
    slope = sum(float((p.grad * direction[n]).sum()) for n, p in plain.named_parameters())
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for n, p in plain.named_parameters():
                p += sign * 1e-6 * direction[n]
            values.append(plain.loss(batch, info()).total.item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_a_dead_decoder_row_grows_from_zero():
    """AuxK at the start: the rows are 0, and their gradient is not."""
    batch, dead = pairs(64), torch.arange(D_SAE) < 4
    sae = TranscoderSAE(TranscoderConfig(D_SAE, 4), D_IN, d_out=D_OUT)
    sae.set_normalization(*moments(batch.x), *moments(batch.y))
    sae.loss(batch, info(dead)).terms["auxk"].backward()
    assert sae.W_dec.grad is not None
    assert torch.equal(sae.W_dec.grad.abs().sum(1) > 0, dead)
    before = sae.W_dec.detach().clone()
    sae.after_step()  # keeps no norm
    assert torch.equal(sae.W_dec, before)


@BOTH
def test_saved_and_loaded(tmp_path, name):
    sae, x = build(name, hook_name_out="b"), pairs(300).x
    sae.provenance = replace(sae.provenance, origin={"hook_name": "a", "hook_name_out": "b"})
    save_sae(sae, tmp_path, golden_inputs=x)
    back = load_sae(tmp_path)
    assert back.hash == sae.hash and back.shape == {"d_out": D_OUT} and back.config == sae.config
    assert torch.equal(back(x).x_hat, sae(x).x_hat) and back(x).x_hat.shape == (300, D_OUT)
    meta = json.loads((tmp_path / "sae.json").read_text())
    assert (meta["hook_name"], meta["hook_name_out"], meta["d_in"], meta["d_out"]) == ("a", "b", D_IN, D_OUT)
    assert back.provenance.origin == sae.provenance.origin and str(hooks_of(back)) == "a -> b"


def test_wrong_widths_are_named():
    sae = build()
    with pytest.raises(ValueError, match=rf"d_in={D_IN}.*\(3, {D_OUT}\)"):
        sae.encode(torch.zeros(3, D_OUT))
    with pytest.raises(ValueError, match=rf"predicts \(3, {D_OUT}\), got y of shape \(3, {D_IN}\)"):
        sae.loss(Batch(torch.zeros(3, D_IN), torch.zeros(3, D_IN)), info())


# --- training

SMALL = TrainConfig(n_tokens=64 * 40, batch_size=64, warmup_steps=5, checkpoint_every=10, dead_after_tokens=500)


@BOTH
def test_it_learns_from_a_batch_of_tensors(name):
    batch = pairs(4000)
    config = CLASSES[name].Config(64, 8)
    options = TrainConfig(n_tokens=128 * 300, batch_size=128, warmup_steps=20)
    sae = train(config, batch, options, progress=False)
    fvu = (sae(batch.x).x_hat - batch.y).square().sum() / (batch.y - batch.y.mean(0)).square().sum()
    assert fvu.item() < 0.1
    assert sae.shape == {"d_out": D_OUT} and hooks_of(sae, "a").outputs == ("y",)


@BOTH
def test_interrupted_and_resumed_gives_the_same_bits(tmp_path, monkeypatch, name):
    batch, config = pairs(2000), CLASSES[name].Config(32, 4)
    whole = train(config, batch, SMALL, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_before(27, patch)
        train(config, batch, SMALL, tmp_path / "cut", progress=False)
    assert train(config, batch, SMALL, tmp_path / "cut", progress=False).hash == whole.hash
    for file in ("sae.safetensors", "golden.safetensors", "sae.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_x_and_y_come_from_the_hooks_of_a_cache(tmp_path):
    cache = make_cache(tmp_path / "cache", n_sequences=80, hooks=("p", "q"))
    configs = [TranscoderConfig(8, 2, hook_name_out="q"), TranscoderConfig(8, 2), TopKConfig(8, 2)]
    options = TrainConfig(n_tokens=32 * 4, batch_size=32, checkpoint_every=0)
    saes = train(configs, cache, options, hook_name="p", progress=False)
    assert [str(hooks_of(sae)) for sae in saes] == ["p -> q", "p", "p"]
    assert saes[0].provenance.origin["hook_name"] == "p" and saes[0].provenance.origin["hook_name_out"] == "q"
    assert saes[0].provenance.origin["mask"]["max_norm"] == {"p": 10.0, "q": 10.0}
    assert "hook_name_out" not in saes[1].provenance.origin and saes[2].provenance.origin["mask"]["max_norm"] == 10.0
    inferred = train(configs[0], cache, options, progress=False)  # q is written, so p is read
    assert inferred.hash == saes[0].hash
    with pytest.raises(ValueError, match="hook_name_out='z' is not in the cache, which holds p, q"):
        train(TranscoderConfig(8, 2, hook_name_out="z"), cache, options, hook_name="p", progress=False)
    with pytest.raises(ValueError, match="several hooks; set hook_name to one of p, q"):
        train(configs[1], cache, options, progress=False)


def test_which_hook_is_read_is_inferred_only_where_one_is_left():
    config = TranscoderConfig(8, 2, hook_name_out="q")
    assert str(TranscoderSAE.hooks(config, ["p", "q"])) == "p -> q" and str(TranscoderSAE.hooks(config, ["q"])) == "q"
    with pytest.raises(ValueError, match="one of p, r"):
        TranscoderSAE.hooks(config, ["p", "q", "r"])


def test_iterators_of_batches():
    batch = pairs(64 * 40)
    chunks = [Batch(x, y) for x, y in zip(batch.x.split(100), batch.y.split(100), strict=True)]
    sae = train(TranscoderConfig(16, 2), iter(chunks), SMALL, progress=False)
    assert isinstance(sae, TranscoderSAE)
    torch.testing.assert_close(sae.center_out, batch.y[:100].mean(0))
    with pytest.raises(ValueError, match="must have x and y; this one has x"):
        train(TranscoderConfig(16, 2), iter([chunks[0], batch.x, *chunks]), SMALL, progress=False)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (pairs(64).x, r"hook_name_out='b' needs rows of that hook.*Batch\(x, y\)"),
        (Batch(torch.ones(64, 3), torch.ones(63, 3)), r"must have the same number of rows, got \[64, 63\]"),
        (Batch(torch.ones(64, 3), torch.full((64, 3), torch.inf)), "64 of 64 rows contain NaN"),
        (torch.ones(64, 2, 3), "hook_name_out='b' needs rows"),
    ],
)
def test_data_that_does_not_fit_is_explained(data, says):
    with pytest.raises(ValueError, match=says):
        train(TranscoderConfig(16, 2, hook_name_out="b"), data, SMALL, progress=False)


def test_a_target_that_stops_being_finite_stops_the_run():
    batch = pairs(192)
    batch.y[64:128] = torch.nan
    chunks = [Batch(x, y) for x, y in zip(batch.x.split(64), batch.y.split(64), strict=True)]
    with pytest.raises(TrainingError, match="64 of 64 activations in batch 1 are NaN"):
        train(TranscoderConfig(16, 2), iter(chunks), TrainConfig(n_tokens=192, batch_size=64), progress=False)
