"""The gradient SAE: which features it selects, the identities of its ranking, the data it is trained on, with and without g."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from test_cache_repair import TEXTS
from tiny_saes import D_IN, D_SAE, config_of, info, rows

import saelab
from saelab.activation_cache.streaming import stream
from saelab.evaluation.gradient_selection import gradient_selection
from saelab.saes import Batch, GradientConfig, GradientSAE, TopKConfig, TopKSAE
from saelab.training import TrainConfig, train

HOOK = "blocks.1.hook_resid_post"
SHORT = TrainConfig(n_tokens=128 * 6, batch_size=128, device="cpu")


def gradients(n: int, seed: int = 9) -> torch.Tensor:
    return 1e-3 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))


def built(variant: Any = GradientSAE, **changes: Any) -> Any:
    """In float64, with biases that are not 0."""
    Config = GradientConfig if variant is GradientSAE else TopKConfig
    sae = variant(Config(D_SAE, 5, **changes), D_IN, seed=3).double()
    sae.set_normalization(torch.linspace(-2, 2, D_IN), 40.0)
    with torch.no_grad():
        sae.b_enc.add_(0.1 * torch.randn(D_SAE, generator=torch.Generator().manual_seed(1)))
        sae.b_dec.add_(0.1 * torch.randn(D_IN, generator=torch.Generator().manual_seed(2)))
    return sae


@pytest.mark.parametrize(("mode", "beta"), [("add", 1.0), ("add", 4.0), ("only", 1.0)])
def test_it_keeps_the_largest_by_the_formula(mode, beta):
    """s = z (1 + beta |W_dec g| / mean |W_dec g|), or the second term alone, over dense tensors; what is stored is z."""
    sae, x, g = built(mode=mode, beta=beta), rows(60).double(), gradients(60).double()
    found = sae.loss(Batch(x, x, g), info()).feature_acts.to_dense()
    u = ((x - sae.center) * sae.scale - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    z, effect = u.relu(), (g @ sae.W_dec.T).abs()
    effect = effect / effect.mean(1, keepdim=True)
    scores = z * (1 + beta * effect) if mode == "add" else z * effect
    want = torch.zeros_like(z)
    for i, best in enumerate(scores.topk(5).indices):
        want[i, best] = z[i, best]
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found != 0, sae.encode(x).to_dense() != 0)
    assert torch.equal(sae.encode_with(x, g).to_dense(), found)


def test_without_effect_it_is_topk():
    """Identity E15, beta 0; and a gradient of 0, or none, in either mode."""
    x, g = rows(60).double(), gradients(60).double()
    topk = built(TopKSAE)
    want, dead = topk.loss(Batch(x, x), info()), torch.arange(D_SAE) < 9
    for sae, gradient in (
        (built(beta=0.0), g),
        (built(), torch.zeros_like(g)),
        (built(mode="only"), torch.zeros_like(g)),
        (built(), None),
    ):
        found = sae.loss(Batch(x, x, gradient), info())
        assert torch.equal(found.feature_acts.to_dense(), want.feature_acts.to_dense())
        assert found.total.item() == want.total.item()
        assert (
            sae.loss(Batch(x, x, gradient), info(dead)).total.item() == topk.loss(Batch(x, x), info(dead)).total.item()
        )
        assert torch.equal(sae.encode(x).to_dense(), topk.encode(x).to_dense())


@pytest.mark.parametrize("mode", ["add", "only"])
def test_sign_and_size_of_the_gradient_do_not_matter(mode):
    sae, x, g = built(mode=mode), rows(60).double(), gradients(60).double()
    want = sae.encode_with(x, g).to_dense()
    sizes = torch.logspace(-6, 6, 60, dtype=torch.float64)[:, None]  # of each token's own
    for other in (-g, 1000 * g, sizes * g):
        assert torch.equal(sae.encode_with(x, other).to_dense() != 0, want != 0)


def test_what_the_readout_ignores_is_dropped_first():
    """Two features fire, the larger along a direction that the loss does not depend on: one kept, it is the other."""
    sae = GradientSAE(GradientConfig(4, 1, mode="add", beta=10.0, normalize="none"), 4)
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(torch.eye(4))
    x = torch.tensor([[3.0, 1.0, 0.0, 0.0], [2.0, 0.0, 0.5, 0.0]], requires_grad=True)
    readout = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, -2.0, -1.0, 0.5]])
    loss = torch.nn.functional.cross_entropy(x @ readout.T, torch.tensor([0, 1]), reduction="sum")
    (g,) = torch.autograd.grad(loss, x)
    assert not bool(g[:, 0].any())
    assert sae.encode_with(x.detach(), g).features.tolist() == [1, 2]
    assert sae.encode(x.detach()).features.tolist() == [0, 0]


def test_the_loss_has_the_right_slope_in_float64():
    sae, batch = built(), Batch(rows(6).double(), rows(6).double(), gradients(6).double())
    sae.loss(batch, info()).total.backward()
    for name, p in sae.named_parameters():
        direction, values = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(4)), []
        for by in (1e-6, -2e-6):
            with torch.no_grad():
                p += by * direction
                values.append(sae.loss(batch, info()).total.item())
        with torch.no_grad():
            p += 1e-6 * direction
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float((p.grad * direction).sum()), rel=1e-5), name


@pytest.mark.parametrize("changes", [{"beta": -1.0}, {"beta": math.inf}])
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
        GradientConfig(D_SAE, 5, **changes)


# --- training data


@pytest.fixture(scope="module")
def caches(tmp_path_factory, tiny_lm) -> dict[bool, Any]:
    """With and without gradients, of one hook."""
    sizes: dict[str, Any] = {"ctx_len": 32, "batch_size": 8, "shard_rows": 256, "pool_shards": 2, "progress": False}
    folder = tmp_path_factory.mktemp("gradient")
    return {
        with_them: saelab.harvest(tiny_lm, TEXTS, HOOK, 1_500, folder / str(with_them), gradients=with_them, **sizes)
        for with_them in (True, False)
    }


def test_a_cache_is_trained_on_with_the_gradients_of_its_rows(caches, tmp_path, monkeypatch):
    """Each step gets pairs as they stand in the cache, in two parts; the SAE differs from one trained without, and is saved."""
    seen, loss = [], GradientSAE.loss
    monkeypatch.setattr(GradientSAE, "loss", lambda self, batch, info: seen.append(batch) or loss(self, batch, info))
    config, halves = GradientConfig(64, 4), dataclasses.replace(SHORT, grad_accumulation=2)
    sae = train(config, caches[True], halves, tmp_path / "sae", progress=False)
    stored = caches[True].batches(128, hook_name=[HOOK, f"{HOOK}.gradient"])
    for i, batch in zip(range(6), stored, strict=False):
        halves_seen = seen[2 * i], seen[2 * i + 1]
        assert torch.equal(torch.cat([one.x for one in halves_seen]), batch[HOOK])
        assert torch.equal(torch.cat([one.gradient for one in halves_seen]), batch[f"{HOOK}.gradient"])
    assert len(seen) == 12
    assert sae.provenance.origin["hook_name"] == HOOK and "hook_names" not in sae.provenance.origin
    assert saelab.load_sae(tmp_path / "sae").hash == sae.hash
    assert train(GradientConfig(64, 4, beta=0.0), caches[True], halves, progress=False).hash != sae.hash


@pytest.mark.parametrize("what", ["cache", "path", "stream", "tensor", "iterator", "batch"])
def test_data_without_gradients_is_refused_with_the_fix(caches, tiny_lm, what):
    plain, x = caches[False], rows(300)
    data = {
        "cache": lambda: plain,
        "path": lambda: plain.path,
        "stream": lambda: stream(tiny_lm, TEXTS, HOOK, ctx_len=32),
        "tensor": lambda: x,
        "iterator": lambda: iter([x]),
        "batch": lambda: Batch(x, x),
    }[what]()
    fix = rf"saelab harvest RUN --hook-name {HOOK} --n-tokens NUMBER --gradients\."
    fix = fix if what in ("cache", "path", "stream") else r"pass a Batch\(x, x, gradient\)|not a Batch\(x, y\)"
    with pytest.raises(ValueError, match=fix):
        train(GradientConfig(D_SAE, 5), data, SHORT, progress=False)


def test_tensors_with_a_gradient_are_trained_on_and_others_ignore_it():
    x, g = rows(500), gradients(500)
    one, other = (train(GradientConfig(D_SAE, 5), Batch(x, x, by), SHORT, progress=False) for by in (g, g.flip(0)))
    assert one.hash != other.hash
    plain = [train(config_of("topk"), data, SHORT, progress=False) for data in (x, Batch(x, x, g))]
    assert plain[0].hash == plain[1].hash
    chunks = iter([Batch(x, x, g)] * 2)
    assert train(GradientConfig(D_SAE, 5), chunks, SHORT, progress=False).d_in == D_IN
    with pytest.raises(ValueError, match=r"must have the shape of x, \(500, 12\); got \(400, 12\)"):
        train(GradientConfig(D_SAE, 5), Batch(x, x, g[:400]), SHORT, progress=False)
    with pytest.raises(ValueError, match="1 of 500 rows contain NaN or infinite values"):
        train(
            GradientConfig(D_SAE, 5), Batch(x, x, g.index_fill(0, torch.tensor([3]), torch.nan)), SHORT, progress=False
        )


def test_it_is_scored_with_and_without_gradients(caches, tiny_lm):
    sae = train(GradientConfig(64, 4), caches[True], SHORT, progress=False)
    options: dict[str, Any] = {"allow_train": True, "n_tokens": 256}
    found = gradient_selection(sae, tiny_lm, TEXTS[:12], **options)
    report = saelab.evaluate(sae, tiny_lm, TEXTS[:12], progress=False, n_tokens_ce=256, **options)
    assert found.ce_loss == pytest.approx(report.ce_loss, rel=1e-4)
    assert found.ce_loss_sae == pytest.approx(report.ce_loss_sae, rel=1e-4)
    assert found.fvu == pytest.approx(report.fvu, rel=0.05) and found.fvu < found.fvu_with_gradients
    assert found.l0 == found.l0_with_gradients == 4 and found.n_tokens > 200
    sae.config = GradientConfig(64, 4, beta=0.0)
    same = gradient_selection(sae, tiny_lm, TEXTS[:12], **options)
    assert same.fvu == same.fvu_with_gradients and same.ce_loss_sae == same.ce_loss_sae_with_gradients
    with pytest.raises(ValueError, match="needs an SAE of the variant gradient; got 'topk'"):
        gradient_selection(TopKSAE(TopKConfig(64, 4), 32), tiny_lm, TEXTS)
