"""Crosscoders: hand numbers, identities with the SAEs of one source, training on several, what they say of two sources."""

import copy
import json
import math
from functools import partial

import pytest
import tiny_saes
import torch
from test_activation_cache import make_cache
from tiny_saes import interrupt_before, moments

from saelab.evaluation.crosscoder import CLASSES, LatentScaling, compare_decoders, latent_scaling
from saelab.io import load_sae, save_sae
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import (
    Batch,
    BatchTopKConfig,
    BatchTopKSAE,
    CrosscoderConfig,
    CrosscoderSAE,
    ReLUConfig,
    ReLUSAE,
    TopKConfig,
)
from saelab.saes.hooks_used import HooksUsed
from saelab.saes.trained_hooks import hooks_of
from saelab.training import TrainConfig, train
from saelab.training.adam import Adam

D_IN, D_SAE, S = 6, 20, 3
info = partial(tiny_saes.info, d_sae=D_SAE)


def rows(n: int, seed: int = 0, n_sources: int = S) -> torch.Tensor:
    """Sources of different size and mean."""
    x = torch.randn(n, n_sources, D_IN, generator=torch.Generator().manual_seed(seed))
    return x * torch.arange(1.0, n_sources + 1)[:, None] + torch.linspace(-1, 3, D_IN)


def build(n_sources: int = S, k: int = 4, **changes) -> CrosscoderSAE:
    sae = CrosscoderSAE(CrosscoderConfig(D_SAE, k, **changes), D_IN, seed=3, n_sources=n_sources)
    x = rows(256, 5, n_sources)
    sae.set_normalization(*moments(x))
    with torch.no_grad():
        sae.b_dec.add_(0.1 * torch.randn(sae.b_dec.shape, generator=torch.Generator().manual_seed(1)))
        sae.loss(Batch(x, x), info())
    return sae


def by_hand(**changes) -> CrosscoderSAE:
    """d_in 1, two sources, two features: encoders (1, 2) and (1, -1), decoders (3, 4) and (1, 0)."""
    sae = CrosscoderSAE(CrosscoderConfig(2, 1, normalize="none", l1_warmup=0.0, **changes), 1, n_sources=2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[[1.0], [1.0]], [[2.0], [-1.0]]]))
        sae.W_dec.copy_(torch.tensor([[[3.0], [1.0]], [[4.0], [0.0]]]))
    return sae


# --- by hand


def test_l1_loss_by_hand():
    """x = (1, 2): u = (1 + 4, 1 - 2), z = (5, 0), x_hat = (15, 20); error 14^2 + 18^2, penalty 5 * (3 + 4)."""
    sae, x = by_hand(sparsity="l1", l1_coefficient=0.5), torch.tensor([[[1.0], [2.0]]])
    loss = sae.loss(Batch(x, x), info(step=0, d_sae=2))
    assert loss.feature_acts.to_dense().tolist() == [[5.0, 0.0]]
    assert loss.total.item() == 14**2 + 18**2 + 0.5 * 5 * 7
    assert sae(x).x_hat.tolist() == [[[15.0], [20.0]]]


def test_batch_topk_ranks_by_the_sum_of_norms_and_stores_the_plain_code():
    """u = (2, 9) on x = (20/3, -7/3): scores 2 * 7 and 9 * 1, so feature 0 wins with the code 2 and threshold 14."""
    sae, x = by_hand(), torch.tensor([[[20 / 3], [-7 / 3]]])
    assert sae.decoder_norms.tolist() == [7.0, 1.0]
    acts = sae.select(sae.normalize(x), info(step=0, d_sae=2))
    torch.testing.assert_close(acts.to_dense(), torch.tensor([[2.0, 0.0]]))
    assert sae.threshold.item() == pytest.approx(14)
    dense = sae.encode(torch.cat([x * 1.01, x * 0.99])).to_dense()  # strictly above 14 / 7, and 9 is under 14
    torch.testing.assert_close(dense, torch.tensor([[2.02, 0.0], [0.0, 0.0]]))


def test_a_feature_that_writes_nothing_never_fires_by_threshold():
    sae = by_hand()
    with torch.no_grad():
        sae.W_dec[:, 1] = 0
        sae.threshold.fill_(0.1)
        sae.n_observed.fill_(1)
    assert sae.encode(torch.tensor([[[100.0], [-100.0]]])).features.tolist() == []


# --- identities


def test_e11_an_l1_crosscoder_of_one_source_is_a_relu_sae():
    config = CrosscoderConfig(D_SAE, 1, sparsity="l1", init_norm=1.0, l1_coefficient=0.7, l1_warmup=0.5)
    crosscoder = CrosscoderSAE(config, D_IN, seed=3)
    relu = ReLUSAE(ReLUConfig(D_SAE, l1_coefficient=0.7, l1_warmup=0.5), D_IN, seed=3)
    x = rows(50, n_sources=1)[:, 0]
    for sae in (crosscoder, relu):
        sae.set_normalization(*moments(x))
    assert torch.equal(crosscoder.W_enc[0], relu.W_enc) and torch.equal(crosscoder.center[0], relu.center)
    assert torch.equal(crosscoder.encode(x).to_dense(), relu.encode(x).to_dense())
    assert torch.equal(crosscoder.encode(x[:, None]).to_dense(), relu.encode(x).to_dense())
    torch.testing.assert_close(crosscoder(x).x_hat, relu(x).x_hat)
    losses = [sae.loss(Batch(x, x), info(step=3)).total for sae in (crosscoder, relu)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name in ("W_enc", "W_dec", "b_dec"):
        a, b = getattr(crosscoder, name).grad, getattr(relu, name).grad
        torch.testing.assert_close(a[0], b)


class NoPreBias(BatchTopKSAE):
    @property
    def pre_bias(self):
        return None


def test_e12_a_batch_topk_crosscoder_of_one_source_is_a_batch_topk_sae():
    crosscoder = CrosscoderSAE(CrosscoderConfig(D_SAE, 4), D_IN, seed=3)
    plain, x = NoPreBias(BatchTopKConfig(D_SAE, 4), D_IN, seed=3), rows(50, n_sources=1)[:, 0]
    with torch.no_grad():
        for W in (crosscoder.W_dec, plain.W_dec):  # norms of exactly 1
            W.zero_().view(D_SAE, D_IN)[torch.arange(D_SAE), torch.arange(D_SAE) % D_IN] = 1
    losses = [sae.loss(Batch(x, x), info(torch.arange(D_SAE) < 3)) for sae in (crosscoder, plain)]
    assert torch.equal(losses[0].feature_acts.to_dense(), losses[1].feature_acts.to_dense())
    assert losses[0].terms.keys() == losses[1].terms.keys() == {"fvu", "auxk"}
    torch.testing.assert_close(losses[0].total, losses[1].total)
    assert torch.equal(crosscoder.threshold, plain.threshold)
    assert torch.equal(crosscoder.encode(x).to_dense(), plain.encode(x).to_dense())
    assert crosscoder.encode(x).nnz > 0


def test_e11_identical_sources_are_rebuilt_alike():
    sae, x = build(2), rows(30, n_sources=1).expand(30, 2, D_IN)
    sae.set_normalization(*moments(x))
    with torch.no_grad():
        for tensor in (sae.W_enc, sae.W_dec, sae.b_dec):
            tensor[1] = tensor[0]
    x_hat = sae(x).x_hat
    torch.testing.assert_close(x_hat[:, 0], x_hat[:, 1], rtol=1e-6, atol=1e-6)


def test_two_equal_halves_are_one_source_with_twice_the_encoder():
    """The ReLU comes after the sum over sources: what two give together counts, not each by itself."""
    two, one = by_hand(sparsity="l1"), CrosscoderSAE(CrosscoderConfig(2, 1, sparsity="l1", normalize="none"), 1)
    with torch.no_grad():
        one.W_enc.copy_(two.W_enc.sum(0, keepdim=True))
    x = torch.tensor([[[1.0]], [[-3.0]]])
    assert torch.equal(two.encode(x.expand(2, 2, 1)).to_dense(), one.encode(x).to_dense())


# --- weights and sizes


def test_weights_lie_one_feature_after_the_other_and_stay_so():
    sae, x = build(), rows(64)
    for convert in (sae.cpu, sae.double, sae.float, lambda: copy.deepcopy(sae)):
        turn = convert()
        W_enc, W_dec, b_dec = turn.rows
        assert W_enc.shape == W_dec.shape == (D_SAE, S * D_IN) and b_dec.shape == (S * D_IN,)
        assert W_enc.data_ptr() == turn.W_enc.data_ptr() and W_dec.is_contiguous()
    assert torch.equal(sae.rows[1][7], sae.W_dec[:, 7].flatten())
    sae.loss(Batch(x, x), info(torch.arange(D_SAE) < 3)).total.backward()
    for parameter in (sae.W_enc, sae.W_dec):
        assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()
    plain = [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in sae.parameters()]
    for twin, parameter in zip(plain, sae.parameters(), strict=True):
        twin.grad = None if parameter.grad is None else parameter.grad.contiguous()
    for adam in (Adam(sae.parameters()), Adam(plain)):
        adam.step(1e-2)
        adam.step(1e-2)
    for twin, parameter in zip(plain, sae.parameters(), strict=True):
        torch.testing.assert_close(parameter, twin)


def test_saved_and_loaded(tmp_path):
    sae, x = build(hook_names=("a", "b", "c")), rows(300)
    save_sae(sae, tmp_path / "given", golden_inputs=x)
    save_sae(sae, tmp_path / "made")
    for name in ("given", "made"):
        back = load_sae(tmp_path / name)
        assert back.hash == sae.hash and back.config == sae.config and back.shape == {"n_sources": S}
        assert torch.equal(back.encode(x).to_dense(), sae.encode(x).to_dense())
        assert back.W_dec.stride() == sae.W_dec.stride()
    meta = json.loads((tmp_path / "given" / "sae.json").read_text())
    assert meta["n_sources"] == S and meta["d_in"] == D_IN


def test_each_source_has_its_own_normalisation():
    x = rows(4000)
    sae = CrosscoderSAE(CrosscoderConfig(D_SAE, 4), D_IN, n_sources=S)
    sae.set_normalization(*moments(x))
    normal = sae.normalize(x).unflatten(1, (S, D_IN))
    torch.testing.assert_close(normal.square().sum(2).mean(0), torch.full((S,), float(D_IN)), rtol=1e-4, atol=0)
    assert float(normal.mean(0).abs().max()) < 1e-5
    torch.testing.assert_close(sae.denormalize(normal.flatten(1)), x)


def test_auxk_teaches_dead_features_in_all_sources():
    sae, x = build(), rows(64)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[3, 8]] = True
    sae.loss(Batch(x, x), info(dead)).terms["auxk"].backward()
    for parameter in (sae.W_enc, sae.W_dec):
        assert parameter.grad is not None
        reached = parameter.grad.abs().sum(2) > 0
        assert reached.shape == (S, D_SAE) and torch.equal(reached, dead.expand(S, D_SAE))


@pytest.mark.parametrize(("rank", "rules", "by_norm"), [("norm", 2, True), ("value", 2, False), ("norm", 1, False)])
def test_auxk_ranks_by_what_a_feature_writes(rank, rules, by_norm):
    """Its authors' u n, unless asked for u, or in a run that began before there was a choice."""
    sae, x = build(k_aux=1, aux_rank=rank), rows(64)
    dead = torch.arange(D_SAE) < 2
    with torch.no_grad():
        sae.W_enc[:, 0], sae.W_enc[:, 1] = 2 * sae.W_enc[:, 2], sae.W_enc[:, 2]  # u of 0 is twice that of 1
        sae.W_dec[:, 0], sae.W_dec[:, 1] = sae.W_dec[:, 2], 3 * sae.W_dec[:, 2]
        sae.b_enc[:2] = 0
    sae.loss(Batch(x, x), info(dead)._replace(rules=rules)).terms["auxk"].backward()
    assert sae.W_enc.grad is not None
    reached = sae.W_enc.grad.abs().sum((0, 2)) > 0
    assert reached.tolist()[:2] == [not by_norm, by_norm]


@pytest.mark.parametrize("shape", [(4, D_IN), (4, S, D_IN + 1), (4, S + 1, D_IN), (S, D_IN, 4), (4, S, D_IN, 1)])
def test_a_wrong_shape_names_what_is_read(shape):
    with pytest.raises(ValueError, match=rf"n_sources={S} .*d_in={D_IN}, got .*\({shape[0]}, "):
        build().encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"l1_coefficient": -1.0}, "l1_coefficient=-1"),
        ({"l1_warmup": 2.0}, "l1_warmup=2"),
        ({"init_norm": 0.0}, "init_norm=0"),
        ({"hook_names": ()}, "hook_names="),
        ({"hook_names": ("a", "a")}, "each only once"),
        ({"k": 99}, "k=99"),
    ],
)
def test_bad_configs_name_the_value(changes, says):
    with pytest.raises(ValueError, match=says):
        CrosscoderConfig(**({"d_sae": D_SAE, "k": 4} | changes))


def test_an_unknown_sparsity_is_named():
    config = CrosscoderConfig(D_SAE, 4)
    object.__setattr__(config, "sparsity", "l0")  # the tests' type checker stops it earlier
    with pytest.raises(ValueError, match="sparsity='l0' must be one of 'batch_topk', 'l1'"):
        config.__post_init__()


# --- training

SMALL = TrainConfig(n_tokens=64 * 40, batch_size=64, warmup_steps=5, checkpoint_every=10, dead_after_tokens=500)


def planted(n=4000, seed=0):
    """Two sources of width 16: 8 features of both, 4 of the first alone, 4 of the second alone."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(2, 16, 16, generator=generator), dim=2)
    directions[1, 8:12] = 0
    directions[0, 12:] = 0
    codes = (torch.rand(n, 16, generator=generator) < 0.1) * (1 + torch.rand(n, 16, generator=generator))
    return torch.einsum("nf,sfd->nsd", codes, directions), directions


@pytest.mark.parametrize("sparsity", ["batch_topk", "l1"])
def test_it_learns_whose_features_are_whose(sparsity):
    x, _ = planted()
    config = CrosscoderConfig(24, 2, sparsity=sparsity, l1_coefficient=0.5)
    options = TrainConfig(n_tokens=128 * 600, batch_size=128, lr=5e-3, warmup_steps=20)
    sae = train(config, x, options, progress=False)
    assert isinstance(sae, CrosscoderSAE)
    error = (sae(x).x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
    assert error.item() < 0.15
    counts = compare_decoders(sae).counts()
    assert counts["a only"] >= 3 and counts["b only"] >= 3 and counts["shared"] >= 6, counts


@pytest.mark.parametrize("sparsity", ["batch_topk", "l1"])
def test_interrupted_and_resumed_gives_the_same_bits(tmp_path, monkeypatch, sparsity):
    x, config = planted()[0], CrosscoderConfig(24, 2, sparsity=sparsity)
    whole = train(config, x, SMALL, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_before(27, patch)
        train(config, x, SMALL, tmp_path / "cut", progress=False)
    again = train(config, x, SMALL, tmp_path / "cut", progress=False)
    assert again.hash == whole.hash
    for name in ("sae.safetensors", "golden.safetensors", "sae.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert load_sae(tmp_path / "cut").hash == whole.hash


def test_sources_come_from_the_hooks_of_a_cache_in_the_order_asked_for(tmp_path):
    cache = make_cache(tmp_path / "cache", n_sequences=80, hooks=("p", "q", "r"))
    configs = [CrosscoderConfig(8, 2), CrosscoderConfig(8, 2, hook_names=("r", "p")), TopKConfig(8, 2)]
    options = TrainConfig(n_tokens=32 * 4, batch_size=32, checkpoint_every=0)
    seen = []

    def loss(self, batch, info):
        seen.append(batch)
        return real(self, batch, info)

    real = CrosscoderSAE.loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrosscoderSAE, "loss", loss)
        saes = train(configs, cache, options, hook_name="q", progress=False)
    assert [sae.shape for sae in saes] == [{"n_sources": 3}, {"n_sources": 2}, {}]
    assert [str(hooks_of(sae)) for sae in saes] == ["p, q, r", "r, p", "q"]
    assert saes[0].provenance.origin["hook_names"] == ["p", "q", "r"] and "hook_names" not in saes[2].provenance.origin
    assert saes[1].provenance.origin["mask"]["max_norm"] == {"r": 10.0, "p": 10.0}
    expected = next(cache.batches(32, seed=0, hook_name="r"))
    assert seen[0].x.shape == (32, 3, 4) and torch.equal(seen[1].x[:, 0], expected) and seen[0].y is seen[0].x
    stats = cache.stats("p")
    assert torch.equal(saes[1].center[1], stats["mean"].float())
    alone = train(configs[2], cache, options, hook_name="q", progress=False)
    assert alone.hash == saes[2].hash


def test_a_cache_of_one_hook_gives_one_source(tmp_path):
    cache = make_cache(tmp_path / "cache", n_sequences=80)
    options = TrainConfig(n_tokens=32 * 4, batch_size=32, checkpoint_every=0)
    sae = train(CrosscoderConfig(8, 2), cache, options, progress=False)
    assert sae.shape == {"n_sources": 1} and hooks_of(sae) == HooksUsed(("h",), ("h",))
    assert sae(next(cache.batches(5))).x_hat.shape == (5, 4)


@pytest.mark.parametrize(
    ("config", "data", "says"),
    [
        (TopKConfig(24, 2), planted(64)[0], "2 sources per row: only a crosscoder"),
        (CrosscoderConfig(24, 2, hook_names=("a",)), planted(64)[0], "names 1 sources; the tensor .* has 2"),
        (CrosscoderConfig(24, 2), Batch(*planted(64)[0].unbind(1)), r"not a Batch\(x, y\)"),
        (CrosscoderConfig(24, 2), torch.full((64, 2, 16), torch.nan), "64 of 64 rows contain NaN"),
    ],
)
def test_data_that_does_not_fit_is_explained(config, data, says):
    with pytest.raises(ValueError, match=says):
        train(config, data, SMALL, progress=False)


def test_hooks_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="hook_names='z' is not in the cache, which holds p, q"):
        CrosscoderSAE.hooks(CrosscoderConfig(8, 2, hook_names=("p", "z")), ["p", "q"])


def test_sites_given_must_be_as_many_as_sources():
    sae = build()
    with pytest.raises(ValueError, match="pass hook_name"):
        hooks_of(sae)
    with pytest.raises(ValueError, match=r"reads 3 sources; hook_name names 2 \(a, b\)"):
        hooks_of(sae, ["a", "b"])
    assert hooks_of(sae, ["a", "b", "c"]).inputs == ("a", "b", "c")


def test_an_iterator_of_tensors_with_sources():
    x = planted(64 * 40)[0]
    sae = train(CrosscoderConfig(24, 2), iter(x.split(100)), SMALL, progress=False)
    torch.testing.assert_close(sae.center, x[:100].mean(0))
    with pytest.raises(ValueError, match=r"\(n, 2, 16\) floats, got \(9, 3, 16\)"):
        train(CrosscoderConfig(24, 2), iter([x[:64], torch.zeros(9, 3, 16), x]), SMALL, progress=False)


# --- two sources compared


def with_decoders(a, b) -> CrosscoderSAE:
    rows = torch.tensor([a, b])
    sae = CrosscoderSAE(CrosscoderConfig(rows.shape[1], 1, normalize="none"), rows.shape[2], n_sources=2)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
    return sae


def test_decoder_norms_and_classes_by_hand():
    a = [[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]
    b = [[4.0, 3.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.5], [0.0, 1.5]]
    found = compare_decoders(with_decoders(a, b))
    torch.testing.assert_close(found.share_b, torch.tensor([0.5, 0, 1, 1 / 3, 3 / 7], dtype=torch.float64))
    torch.testing.assert_close(found.delta, torch.tensor([0.5, 0, 1, 0.25, 0.375], dtype=torch.float64))
    assert [CLASSES[i] for i in found.classes] == ["shared", "a only", "b only", "other", "other"]
    assert found.counts() == {"a only": 1, "shared": 1, "b only": 1, "other": 2}
    assert found.cosine[0].item() == pytest.approx(24 / 25) and found.cosine[3].item() == 0


def test_swapping_the_sources_mirrors_delta():
    sae = build()
    there, back = compare_decoders(sae, 0, 2), compare_decoders(sae, 2, 0)
    torch.testing.assert_close(there.delta, 1 - back.delta)
    assert not torch.equal(there.delta, back.delta)
    for wrong in ((0, 0), (0, 3), (-4, 0)):
        with pytest.raises(ValueError, match="two different ones of the 3"):
            compare_decoders(sae, *wrong)


def test_latent_scaling_is_least_squares():
    sae, x = build(), rows(200)
    found = latent_scaling(sae, x.split(33), a=0, b=2)
    normal = sae.normalize(x).unflatten(1, (S, D_IN)).double()
    codes, decoder = sae.encode(x).to_dense().double(), sae.W_dec.detach().double()
    x_hat = torch.einsum("nf,sfd->nsd", codes, decoder) + sae.b_dec.double()
    fired = codes.any(0).nonzero().flatten().tolist()
    assert len(fired) > 10
    for j in fired:
        z, d = codes[:, j], decoder[2, j]
        along = (z[:, None] * d).reshape(-1, 1)
        for source, beta_error, beta_reconstruction in (
            (0, found.beta_error_a, found.beta_reconstruction_a),
            (2, found.beta_error_b, found.beta_reconstruction_b),
        ):
            left = normal[:, source] - x_hat[:, source] + z[:, None] * decoder[source, j]
            for y, beta in ((left, beta_error), (x_hat[:, source], beta_reconstruction)):
                solved = torch.linalg.lstsq(along, y.detach().reshape(-1, 1)).solution.item()
                assert beta[j].item() == pytest.approx(solved, rel=1e-4, abs=1e-5)
    assert found.nu_error.isnan().tolist() == [j not in fired for j in range(D_SAE)]


def planted_scaling(beta: float, n: int = 5000):
    """One feature that fires with z; source b is z d, source a is beta z d and noise; a's decoder row is 0."""
    generator = torch.Generator().manual_seed(0)
    d = torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
    sae = CrosscoderSAE(CrosscoderConfig(1, 1, sparsity="l1", normalize="none"), 8, n_sources=2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.stack([torch.zeros(1, 8), d[None]]))
        sae.W_dec.copy_(torch.stack([torch.zeros(1, 8), d[None]]))
    z = torch.rand(n, 1, generator=generator)
    noise = 0.1 * torch.randn(n, 8, generator=generator)
    return sae, torch.stack([beta * z * d + noise, z * d], 1)


@pytest.mark.parametrize("beta", [0.37, 0.0])
def test_latent_scaling_finds_a_planted_factor(beta):
    """The crosscoder says b only; the error of a still holds `beta` of the feature (shrinkage), or nothing of it."""
    sae, x = planted_scaling(beta)
    assert compare_decoders(sae).classes.tolist() == [2]
    found = latent_scaling(sae, x.split(512))
    assert found.nu_error.item() == pytest.approx(beta, abs=0.01)
    assert found.beta_error_b.item() == pytest.approx(1, abs=1e-5)
    assert found.nu_reconstruction.item() == pytest.approx(0, abs=1e-6)
    assert found.specific_to_b().tolist() == [beta == 0.0]


def test_latent_scaling_sees_another_feature_that_writes_the_same():
    """A second feature with the same code writes d into a: nothing is left in the error, all is in the reconstruction."""
    sae, x = planted_scaling(1.0)
    two = CrosscoderSAE(CrosscoderConfig(2, 1, sparsity="l1", normalize="none"), 8, n_sources=2)
    d = sae.W_dec[1, 0].detach()
    with torch.no_grad():
        two.W_enc.copy_(sae.W_enc.expand(2, 2, 8))
        two.W_dec.copy_(torch.stack([torch.stack([0 * d, d]), torch.stack([d, 0 * d])]))
    found = latent_scaling(two, [x])
    assert found.nu_error[0].item() == pytest.approx(0, abs=0.02)
    assert found.nu_reconstruction[0].item() == pytest.approx(1, abs=0.02)
    assert not found.specific_to_b()[0]


@pytest.mark.parametrize(
    ("a", "b", "specific"),
    [
        (0.1, 1.0, True),
        (-0.1, 1.0, True),
        (-0.9, 1.0, False),
        (0.9, 1.0, False),
        (0.1, -1.0, False),
        (math.nan, 1.0, False),
    ],
)
def test_a_ratio_of_either_sign_tells_whose_a_feature_is(a, b, specific):
    beta, one, none = torch.tensor([a]), torch.tensor([b]), torch.zeros(1)
    assert LatentScaling(beta, one, none, abs(one)).specific_to_b().tolist() == [specific]
    assert LatentScaling(none, abs(one), beta, one).specific_to_b().tolist() == [specific]


def test_raw_units_are_those_of_a_crosscoder_that_was_not_normalised():
    """The same features in a source that is 3 times smaller: nu of the weights' units, and of the models'."""
    sae, x = planted_scaling(0.6)
    raw = CrosscoderSAE(sae.config, 8, n_sources=2)
    raw.load_state_dict(sae.state_dict())
    x, scale = x / torch.tensor([3.0, 1.0])[:, None], torch.tensor([3.0, 1.0])
    raw.scale.copy_(scale)
    normalized, found = latent_scaling(raw, [x]), latent_scaling(raw, [x], units="raw")
    assert normalized.nu_error.item() == pytest.approx(0.6, abs=0.02)
    assert found.nu_error.item() == pytest.approx(0.2, abs=0.01)
    with torch.no_grad():  # the same crosscoder, its scales in its weights
        raw.W_enc.mul_(scale[:, None, None])
        raw.W_dec.div_(scale[:, None, None])
        raw.scale.fill_(1)
    plain = latent_scaling(raw, [x])
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert compare_decoders(raw).norms_b.tolist() == compare_decoders(raw, units="raw").norms_b.tolist()
    with pytest.raises(ValueError, match="units='metres'"):
        latent_scaling(raw, [x], units="metres")


def test_e23_two_identical_sources_give_nu_of_1():
    sae, x = build(2), rows(100, n_sources=1).expand(100, 2, D_IN)
    with torch.no_grad():
        for tensor in (sae.W_enc, sae.W_dec, sae.b_dec, sae.center, sae.scale):
            tensor[1] = tensor[0]
    found = latent_scaling(sae, [x])
    seen = ~found.nu_error.isnan()
    assert int(seen.sum()) > 10
    for nu in (found.nu_error, found.nu_reconstruction):
        torch.testing.assert_close(nu[seen], torch.ones_like(nu[seen]), rtol=1e-6, atol=1e-6)


def test_codes_of_a_crosscoder_are_sparse_acts():
    acts = build().encode(rows(9))
    assert isinstance(acts, SparseActs) and acts.batch == 9 and acts.d_sae == D_SAE and acts.nnz > 0
