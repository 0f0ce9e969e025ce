"""Cross-layer transcoders: against the dense formula, causality, the transcoders they are with one layer, training, steering."""

from functools import partial
from typing import Any

import pytest
import tiny_saes
import torch
from test_activation_cache import make_cache
from tiny_saes import away_from_start, interrupt_before

import saelab
from saelab.edits.feature_handle import FeatureHandle
from saelab.features.weight_shares import source_norms
from saelab.io import load_sae, save_sae
from saelab.saes import (
    Batch,
    BatchTopKTranscoderConfig,
    BatchTopKTranscoderSAE,
    CrossLayerTranscoderConfig,
    CrossLayerTranscoderSAE,
    JumpReLUTranscoderConfig,
    JumpReLUTranscoderSAE,
    TranscoderConfig,
    TranscoderSAE,
)
from saelab.saes.trained_hooks import hooks_of
from saelab.training import TrainConfig, train

D_IN, D_OUT, D_SAE, K, L = 6, 5, 24, 4, 3
EACH = D_SAE // L
info = partial(tiny_saes.info, d_sae=D_SAE)
KINDS = pytest.mark.parametrize("sparsity", ["topk", "batch_topk", "jumprelu"])


def pairs(n: int, seed: int = 0, n_layers: int = L) -> Batch:
    """Inputs and outputs of different sizes and means, float64; y is no linear function of x."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n_layers, D_IN, generator=generator, dtype=torch.float64)
    mix = torch.randn(
        n_layers * D_IN, n_layers * D_OUT, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    y = (x.flatten(1) @ mix).relu().unflatten(1, (n_layers, D_OUT))
    sizes = torch.arange(1.0, n_layers + 1, dtype=torch.float64)[:, None]
    return Batch(sizes * x + torch.linspace(-1, 3, D_IN), sizes * y - 7)


def build(sparsity: str = "batch_topk", n_layers: int = L, **changes: Any) -> CrossLayerTranscoderSAE:
    """In float64, with weights moved off 0 and a threshold from one batch."""
    options: dict[str, Any] = {"k": K, "sparsity": sparsity, **changes}
    batch, config = pairs(256, 5, n_layers), CrossLayerTranscoderConfig(D_SAE, **options)
    sae = CrossLayerTranscoderSAE(config, D_IN, seed=3, n_sources=n_layers, d_out=D_OUT).double()
    away_from_start(sae, batch).loss(batch, info())
    return sae


def dense(sae: CrossLayerTranscoderSAE, batch: Batch):
    """Normalised inputs and targets by layer, and pre-activations, from the weights as the formula names them."""
    x, y = (part.unflatten(1, (L, -1)) for part in sae.normalized(batch))
    W_enc, b_enc = sae.W_enc.unflatten(0, (L, EACH)), sae.b_enc.unflatten(0, (L, EACH))
    return x, y, torch.cat([x[:, layer] @ W_enc[layer].T + b_enc[layer] for layer in range(L)], 1)


def rebuilt(sae: CrossLayerTranscoderSAE, z: torch.Tensor) -> torch.Tensor:
    """The sum over the decoders of all layers up to each target."""
    blocks, first = [], 0
    for target in range(L):
        blocks.append(sae.W_dec[first : first + (target + 1) * EACH].unflatten(0, (target + 1, EACH)))
        first += (target + 1) * EACH
    assert first == len(sae.W_dec) == D_SAE * (L + 1) // 2
    z = z.unflatten(1, (L, EACH))
    sums = [
        sum(z[:, layer] @ blocks[target][layer] for layer in range(target + 1)) + sae.b_dec[target]
        for target in range(L)
    ]
    return torch.stack(sums, 1)


def norms_of(sae: CrossLayerTranscoderSAE) -> torch.Tensor:
    """Of each feature's rows, concatenated."""
    return torch.cat([sae.decoder(target)[0] for target in range(L)], 1).norm(dim=1)


def selected(sae: CrossLayerTranscoderSAE, u: torch.Tensor) -> torch.Tensor:
    k, each = sae.config.k, sae.config.k_over == "each_layer"
    if sae.config.sparsity == "jumprelu":
        return u * (u > sae.theta)
    groups = u.unflatten(1, (L, EACH)).transpose(0, 1) if each else u[None]  # (groups, n, features)
    n = k // L if each else k
    if sae.config.sparsity == "topk":
        kth = groups.topk(n, dim=2).values[:, :, -1:]
    else:
        kth = groups.flatten(1).topk(n * len(u), dim=1).values[:, -1, None, None]
    return torch.cat(list((groups * (groups >= kth)).relu()), 1)


@pytest.mark.parametrize(
    ("sparsity", "changes"),
    [
        ("topk", {}),
        ("topk", {"k": 6, "k_over": "each_layer"}),
        ("batch_topk", {}),
        ("batch_topk", {"k": 6, "k_over": "each_layer"}),
        ("jumprelu", {"sparsity_coefficient": 0.3}),
    ],
)
def test_loss_and_gradients_are_those_of_the_dense_formula(sparsity, changes):
    sae = build(sparsity, **changes)
    batch, dead = pairs(40), torch.isin(torch.arange(D_SAE), torch.tensor([1, 9]))
    sae.zero_grad()
    loss = sae.loss(batch, info(dead))
    loss.total.backward()
    got = {name: one.grad for name, one in sae.named_parameters() if name != "log_threshold"}
    sae.zero_grad()
    _, y, u = dense(sae, batch)
    z = selected(sae, u)
    residual = rebuilt(sae, z) - y
    torch.testing.assert_close(loss.feature_acts.to_dense(), z.detach())
    torch.testing.assert_close(loss.residual, residual.flatten(1).detach())
    error = residual.square().sum()
    if sparsity == "jumprelu":
        pre_act = ((sae.theta - u)[:, dead].relu() * norms_of(sae)[dead]).sum() / 40
        total = error / 40 + 0.3 * (4 * z * norms_of(sae)).tanh().sum() / 40 + 3e-6 * pre_act
    else:
        spread, rest = (y - y.mean(0)).square().sum(), -residual.detach()
        helped = rebuilt(sae, u.relu() * dead) - sae.b_dec  # at most 3 per token: both
        total = error / spread + (helped - rest).square().sum() / (rest - rest.mean(0)).square().sum() / 32
    torch.testing.assert_close(loss.total, total)
    total.backward()
    for name, grad in got.items():
        torch.testing.assert_close(grad, sae.get_parameter(name).grad, rtol=1e-9, atol=1e-9)


@KINDS
def test_outputs_are_the_sums_over_the_decoders_of_earlier_layers(sparsity):
    sae, batch = build(sparsity), pairs(30)
    output = sae(batch.x)
    want = rebuilt(sae, output.acts.to_dense()) / sae.scale_out[:, None] + sae.center_out
    torch.testing.assert_close(output.x_hat, want)
    assert output.acts.nnz > 0 and output.x_hat.shape == (30, L, D_OUT)


@KINDS
def test_an_input_reaches_the_outputs_of_its_own_and_later_layers_alone(sparsity):
    """The k largest of all layers together push each other out, so of "topk" only those of each layer."""
    sae, x = build(sparsity, **({"k": 6, "k_over": "each_layer"} if sparsity == "topk" else {})), pairs(200).x
    before = sae(x)
    for layer in range(L):
        moved = x.clone()
        moved[:, layer] += 1
        after = sae(moved)
        changed = [not torch.equal(after.x_hat[:, target], before.x_hat[:, target]) for target in range(L)]
        assert changed == [target >= layer for target in range(L)], layer
        same = sae.layer_of(before.acts.features) != layer
        assert torch.equal(before.acts.features[same], after.acts.features[sae.layer_of(after.acts.features) != layer])


TWINS: dict[str, Any] = {
    "topk": (TranscoderSAE, TranscoderConfig(D_SAE, K)),
    "batch_topk": (BatchTopKTranscoderSAE, BatchTopKTranscoderConfig(D_SAE, K)),
    "jumprelu": (JumpReLUTranscoderSAE, JumpReLUTranscoderConfig(D_SAE, loss="tanh")),
}


@KINDS
@torch.enable_grad()
def test_with_one_layer_it_is_a_transcoder(sparsity):
    sae, batch, dead = build(sparsity, n_layers=1), pairs(60, n_layers=1), torch.arange(D_SAE) < 3
    cls, config = TWINS[sparsity]
    twin = cls(config, D_IN, d_out=D_OUT).double()
    state = {
        name: one.reshape(twin.state_dict()[name].shape)
        for name, one in sae.state_dict().items()
        if name in twin.state_dict()
    }
    twin.load_state_dict(twin.state_dict() | state)
    losses = [sae.loss(batch, info(dead)), twin.loss(Batch(batch.x[:, 0], batch.y[:, 0]), info(dead))]
    assert torch.equal(losses[0].feature_acts.to_dense(), losses[1].feature_acts.to_dense())
    torch.testing.assert_close(losses[0].total, losses[1].total, rtol=1e-12, atol=0)
    for loss in losses:
        loss.total.backward()
    for name, parameter in twin.named_parameters():
        grad = sae.get_parameter(name).grad
        assert grad is not None
        torch.testing.assert_close(grad.view_as(parameter), parameter.grad, rtol=1e-12, atol=1e-14)
    for one in (sae, twin):
        one.fold_decoder_norms()
    assert torch.equal(sae.encode(batch.x).features, twin.encode(batch.x[:, 0]).features)
    torch.testing.assert_close(sae(batch.x).x_hat, twin(batch.x[:, 0]).x_hat, rtol=1e-12, atol=1e-12)


@KINDS
def test_folding_leaves_outputs_and_a_saved_one_is_the_same(sparsity, tmp_path):
    sae, x = build(sparsity), pairs(60).x
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 3, len(sae.W_dec), dtype=torch.float64)[:, None])
    before, norms = sae(x), sae.decoder_norms.detach()
    torch.testing.assert_close(norms, norms_of(sae).detach())
    sae.fold_decoder_norms()
    after = sae(x)
    assert torch.equal(after.acts.features, before.acts.features)
    torch.testing.assert_close(after.x_hat, before.x_hat)
    torch.testing.assert_close(after.acts.values, before.acts.values * norms[before.acts.features])
    torch.testing.assert_close(sae.decoder_norms, torch.ones_like(norms))
    save_sae(sae, tmp_path, golden_inputs=x)
    again = load_sae(tmp_path)
    assert again.hash == sae.hash and again.shape == {"n_sources": L, "d_out": D_OUT}
    assert torch.equal(again(x).x_hat, sae(x).x_hat)


def test_features_know_their_layer_and_what_they_cannot_write_is_not_stored():
    sae = build()
    assert [sae.layer_of(i) for i in (0, EACH - 1, EACH, D_SAE - 1)] == [0, 0, 1, 2]
    assert sae.target_norms.shape == (L, D_SAE) and len(sae.W_dec) == 2 * D_SAE
    for target in range(L):
        rows, scale = sae.decoder(target)
        assert torch.equal(rows[: (target + 1) * EACH], sae.decoders[target])
        assert not rows[(target + 1) * EACH :].any() and scale == sae.scale_out[target]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: CrossLayerTranscoderSAE(CrossLayerTranscoderConfig(25, 4), 6, n_sources=3),
            "d_sae=25 .* multiple .* 3",
        ),
        (
            lambda: CrossLayerTranscoderSAE(CrossLayerTranscoderConfig(24, 4, k_over="each_layer"), 6, n_sources=3),
            "k=4 must be a multiple of the number of layers, 3",
        ),
        (lambda: CrossLayerTranscoderConfig(24, 4, normalize="layer_norm"), "not supported by cross-layer"),
        (lambda: CrossLayerTranscoderConfig(24, 4, hook_names=("a", "a")), "hook_names=.*each only once"),
        (lambda: CrossLayerTranscoderConfig(24, 4, tanh_scale=0.0), "tanh_scale=0.0 must be positive"),
        (lambda: CrossLayerTranscoderConfig(24, 4, pre_act_coefficient=-1.0), "pre_act_coefficient=-1"),
        (lambda: build().encode(torch.zeros(4, L, D_IN + 1)), r"n_sources=3 of width d_in=6, got .*\(4, 3, 7\)"),
        (lambda: build().loss(Batch(pairs(4).x, pairs(4).x), info()), r"predicts n_sources=3 of width d_out=5, got"),
        (
            lambda: CrossLayerTranscoderSAE.hooks(
                CrossLayerTranscoderConfig(24, 4, hook_names_out=("b",)), ["a", "b", "c"]
            ),
            "must be as many",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# --- training, on tensors and on hooks

SMALL = TrainConfig(n_tokens=64 * 40, batch_size=64, warmup_steps=5, checkpoint_every=10, dead_after_tokens=500)


def data(n: int = 2000) -> Batch:
    return Batch(*(part.float() for part in pairs(n)[:2]))


@KINDS
def test_it_learns_and_resumed_gives_the_same_bits(tmp_path, monkeypatch, sparsity):
    batch = data()
    config = CrossLayerTranscoderConfig(48, 6, sparsity=sparsity, target_l0=6.0 if sparsity == "jumprelu" else None)
    whole = train(config, batch, SMALL, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_before(27, patch)
        train(config, batch, SMALL, tmp_path / "cut", progress=False)
    assert train(config, batch, SMALL, tmp_path / "cut", progress=False).hash == whole.hash
    for name in ("sae.safetensors", "golden.safetensors", "sae.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    output = whole(batch.x)
    fvu = (output.x_hat - batch.y).square().sum() / (batch.y - batch.y.mean(0)).square().sum()
    assert fvu.item() < 0.65
    assert sparsity == "jumprelu" or output.acts.nnz / len(batch.x) == pytest.approx(6, rel=0.1)


def test_inputs_and_outputs_come_from_the_hooks_of_a_cache(tmp_path):
    cache = make_cache(tmp_path / "cache", n_sequences=80, hooks=("p", "q", "r", "s"))
    options = TrainConfig(n_tokens=32 * 4, batch_size=32, checkpoint_every=0)
    config = CrossLayerTranscoderConfig(8, 2, hook_names_out=("s", "r"))
    sae = train(config, cache, options, progress=False)
    assert isinstance(sae, CrossLayerTranscoderSAE)
    assert str(hooks_of(sae)) == "p, q -> s, r" and sae.shape == {"n_sources": 2, "d_out": 4}
    origin = sae.provenance.origin
    assert origin["hook_names"] == ["p", "q"] and origin["hook_names_out"] == ["s", "r"]
    assert (origin["hook_name"], origin["hook_name_out"]) == ("q", "r")
    assert torch.equal(sae.center_out[0], cache.stats("s")["mean"].float())
    assert hooks_of(sae, ["a", "b", "c", "d"]).outputs == ("c", "d")
    with pytest.raises(ValueError, match=r"This SAE reads 2 sources; hook_name names 1 \(a\)"):
        hooks_of(sae, "a")
    for bad, says in (
        (Batch(pairs(64).x.float(), pairs(64).y[:, 0].float()), r"same number of sources per row, got \[3, 1\]"),
    ):
        with pytest.raises(ValueError, match=says):
            train(CrossLayerTranscoderConfig(24, 2), bad, options, progress=False)


# --- with a model

INPUTS = ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"]
OUTPUTS = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
TEXTS = [f"The river {i} runs past the old mill, and the man with the red hat said {i}." for i in range(30)]


def of_model(tmp_path, **changes) -> CrossLayerTranscoderSAE:
    config = CrossLayerTranscoderConfig(
        24, 4, sparsity="topk", normalize="none", hook_names=tuple(INPUTS), hook_names_out=tuple(OUTPUTS), **changes
    )
    sae = CrossLayerTranscoderSAE(config, 32, seed=1, n_sources=2)
    with torch.no_grad():
        sae.W_dec.normal_(generator=torch.Generator().manual_seed(0))
    save_sae(sae, tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert isinstance(loaded, CrossLayerTranscoderSAE)
    return loaded


def test_evaluated_by_layer_collected_and_shown(tmp_path, tiny_lm):
    sae = of_model(tmp_path)
    options: dict[str, Any] = {"ctx_len": 32, "progress": False}
    report = saelab.evaluate(sae, tiny_lm, TEXTS, n_tokens_ce=100, **options)
    assert report.fvu_by_hook is not None and list(report.fvu_by_hook) == OUTPUTS
    each = [value for value in report.fvu_by_hook.values() if value is not None]
    assert len(each) == 2 and report.fvu is not None and min(each) < report.fvu < max(each)
    assert f"{OUTPUTS[0]} {each[0]:.4f}" in str(report)
    store = saelab.collect_features(sae, tiny_lm, TEXTS, out_dir=tmp_path / "features", **options)
    assert store.hook_name == OUTPUTS[1] and store.column("n_fired").sum() > 0
    table = sae.target_norms.detach()
    for feature in (3, 20):
        found = source_norms(store, feature)
        assert found is not None and [one["source"] for one in found] == OUTPUTS
        assert [one["norm"] for one in found] == pytest.approx(table[:, feature].tolist(), rel=1e-5)
    assert table[0, 20] == 0 < table[0, 3]
    assert store.feature(3).neighbours(k=2)[0]["cosine"] < 1
    assert store.directions("decoder").shape == (24, 64)


@pytest.mark.parametrize(("feature", "hooks"), [(3, OUTPUTS), (20, OUTPUTS[1:])])
def test_steering_writes_to_every_layer_that_a_feature_reaches(tmp_path, tiny_lm, feature, hooks):
    sae = of_model(tmp_path)
    edit = FeatureHandle(sae, feature).add(2.0, unit="raw")
    before, after = {}, {}
    for found, edits in ((before, ()), (after, (edit,))):
        with tiny_lm.steer(*edits):
            found |= next(iter(tiny_lm.stream_activations([torch.tensor([[5, 6, 7, 8]])], OUTPUTS)))
    reports = tiny_lm.last_report
    assert [one.hook_name for one in reports] == hooks
    first = hooks[0]  # nothing before it has changed, so there the change is the row itself
    change = (after[first] - before[first])[0, 1:]
    row = 2 * sae.decoder(OUTPUTS.index(first))[0][feature].detach()
    torch.testing.assert_close(change, row.expand(3, -1), rtol=1e-3, atol=1e-3)
    if hooks == OUTPUTS[1:]:
        assert torch.equal(after[OUTPUTS[0]], before[OUTPUTS[0]])
    alone = FeatureHandle(sae, 3, OUTPUTS[0]).add(2.0, unit="raw")
    assert [one.hook_name for one in alone.each_hook()] == OUTPUTS[:1]
    with pytest.raises(ValueError, match="use add"):
        FeatureHandle(sae, feature).ablate()
