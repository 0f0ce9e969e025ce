"""What a feature does, measured by zeroing it: against a forward pass edited by hand, kept, refused where it cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_llama
from pages import html_of

import saelab
from saelab.app import state
from saelab.errors import SaelabError
from saelab.features.effect import Estimate, MeasuredEffect, TokenChange, effect_html, read_effect
from saelab.features.measuring import MIN_PROBABILITY, N_SCORED, estimate, measure_effect
from saelab.features.store import load_features
from saelab.features.token_text import token_bytes
from saelab.saes import CrosscoderConfig, CrosscoderSAE, TopKConfig, TopKSAE, TranscoderConfig, TranscoderSAE
from saelab.saes.provenance import Provenance

HOOK, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
TEXTS = [f"Number {i}: the {('river', 'mill', 'hat')[i % 3]} was good and it came to pass {7 * i}." for i in range(60)]


def collect(sae, lm, folder, hook, **options):
    options = {"ctx_len": 32, "top_k": 6, "progress": False} | options
    return saelab.collect_features(sae, lm, TEXTS, out_dir=folder, hook_name=hook, **options)


@pytest.fixture(scope="module", params=[HOOK, Z])
def store(request, tiny_lm, tmp_path_factory):
    """An SAE with biases, centre and scale, so that nothing in the edit is trivial."""
    sae = TopKSAE(TopKConfig(d_sae=48, k=6), 32, seed=2)
    sae.set_normalization(torch.linspace(-0.3, 0.3, 32), 9.0)
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-0.1, 0.1, 48))
    return collect(sae, tiny_lm, tmp_path_factory.mktemp("effect") / "features", request.param)


@pytest.fixture
def feature(store):
    return store.feature(int(np.nanargmax(store.column("n_fired"))))


def edited(store, feature, lm, ids):
    """The raw model with what `ablate` says: the feature's part of the reconstruction subtracted, but at position 0."""
    sae, layer = store.sae, lm.model.model.layers[1]

    def subtract(x):
        z = sae.encode(x.flatten(0, 1)).to_dense()[:, feature].view(x.shape[:2])
        z = torch.cat([torch.zeros(len(x), 1), z[:, 1:]], 1)
        return x - z[..., None] * sae.W_dec[feature] / sae.scale

    if store.hook_name == HOOK:
        hook = layer.register_forward_hook(lambda module, args, out: subtract(out))
    else:
        hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (subtract(args[0]),))
    try:
        return lm.model(ids).logits
    finally:
        hook.remove()


def by_hand(store, feature, lm):
    """Per example: change of the loss, KL, and the log-probabilities of both passes over the scored predictions."""
    found = []
    for example in feature.examples():
        document = store.document(example.document)
        after = [
            int(position)
            for sequence, position in zip(document.context, document.position, strict=True)
            if sequence == example.sequence and position > example.position
        ][:N_SCORED]
        if not after:
            continue
        ids = torch.from_numpy(store.sequence(example.sequence).astype(np.int64))[None]
        with torch.no_grad():
            passes = lm.model(ids).logits, edited(store, feature.feature, lm, ids)
            p, q = (logits[0, example.position : after[-1]].log_softmax(-1) for logits in passes)
        nll = [-x[torch.arange(len(after)), ids[0, after]].mean() for x in (p, q)]
        found.append((float(nll[1] - nll[0]), float((p.exp() * (p - q)).sum(1).mean()), p, q))
    return found


def test_it_equals_a_pass_edited_by_hand(store, feature, tiny_lm):
    measured, found = measure_effect(feature, tiny_lm), by_hand(store, feature, tiny_lm)
    assert measured.n_examples == len(found) > 3 and measured.n_tokens == sum(len(p) for *_, p, _ in found)
    assert measured.loss.mean == pytest.approx(np.mean([loss for loss, *_ in found]), abs=1e-5)
    assert measured.kl.mean == pytest.approx(np.mean([kl for _, kl, *_ in found]), abs=1e-5) and measured.kl.mean > 1e-4
    mean, low, high = measured.loss
    assert low is not None and high is not None and low < mean < high
    change = torch.stack([(q - p).mean(0) for *_, p, q in found]).mean(0)
    before, after = (torch.stack([one[i].exp().mean(0) for one in found]).mean(0) for i in (2, 3))
    likely = torch.maximum(before, after) >= MIN_PROBABILITY
    for side, sign in ((measured.down, -1), (measured.up, 1)):
        best = (sign * change).masked_fill(~likely, -torch.inf).topk(10)
        assert [sign * one.change.mean for one in side] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert side[0].before == pytest.approx(float(before[best.indices[0]]), abs=1e-5)
        assert side[0].after == pytest.approx(float(after[best.indices[0]]), abs=1e-5)
        (spelled,) = token_bytes(tiny_lm.tokenizer, [int(best.indices[0])]).values()
        assert side[0].text == spelled.decode("utf-8", "backslashreplace")


def test_zeroing_nothing_changes_nothing(store, feature, tiny_lm):
    assert measure_effect(feature, tiny_lm, 3).control == 0.0
    silent = next((f for f in map(store.feature, range(len(store))) if f.n_fired), feature)
    handle = silent.handle
    ids = torch.from_numpy(store.sequence(0).astype(np.int64))[None]
    assert torch.equal(tiny_lm.run_with_edit(ids, handle.scale(1.0)), tiny_lm.logits(ids))


def test_scored_tokens_stay_in_the_document(store, feature, tiny_lm):
    """A context holds several documents: what follows in another one is not counted."""
    measured = measure_effect(feature, tiny_lm)
    at_most = sum(min(N_SCORED, len(store.sequence(0)) - 1 - one.position) for one in feature.examples())
    assert measured.n_tokens < at_most


def test_it_is_kept_and_read_without_a_model(store, feature, tiny_lm):
    assert feature.effect() is None
    done = []
    measured = feature.keep_effect(measure_effect(feature, tiny_lm, 4, on_example=lambda n, of: done.append((n, of))))
    assert done[-1] == (measured.n_examples, measured.n_examples) and len(done) == measured.n_examples
    again = load_features(store.folder).feature(feature.feature)
    assert again.effect() == measured and again.scores["effect"]["control"] == 0.0
    assert store.feature((feature.feature + 1) % len(store)).effect() is None
    assert "Zeroing nothing changes nothing" in repr(measured) and "loss per token" in repr(measured)
    assert measured._repr_html_().startswith("<style>") and "<script" not in measured._repr_html_()
    second = feature.effect(tiny_lm, 2)
    assert second is not None and feature.effect() == second != measured
    store.annotations.add(feature.feature, "effect", None)
    assert feature.effect() is None


@pytest.mark.parametrize(
    "value",
    [None, 3, [], {}, {"loss": []}, "effect", {"n_examples": "x"}, [["loss", 1]], {"down": [1], "loss": [1, 2, 3]}],
)
def test_what_is_no_effect_is_none(value):
    assert read_effect(value) is None


def test_an_effect_with_foreign_text_is_only_text():
    change = Estimate(0.5, None, None)
    effect = MeasuredEffect(
        1, 3, change, change, (TokenChange("<img src=x onerror=alert(1)>", change, 0.1, 0.2),), (), 0.0
    )
    assert read_effect(effect.as_json()) == effect
    assert "<img" not in effect_html(effect) and "&lt;img" in effect_html(effect)
    assert "one example" in effect_html(effect)  # which has no interval


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    mean, low, high = estimate(values)
    assert low is not None and high is not None and mean == values.mean()
    assert [mean - low, high - mean] == pytest.approx([1.96 * 2.0 / 20] * 2, rel=0.15)
    assert estimate(np.array([4.0])) == Estimate(4.0, None, None)


def test_what_cannot_be_measured_is_said(store, feature, tiny_lm, tmp_path):
    other = saelab.load_model(build_tiny_llama(tmp_path / "other", seed=5), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="other weights"):
        feature.effect(other)
    with tiny_lm.steer(feature.handle.add(1.0, "raw")), pytest.raises(ValueError, match="is being steered"):
        feature.effect(tiny_lm)
    silent = [i for i in range(len(store)) if not store.feature(i).n_fired]
    with pytest.raises(SaelabError, match="no example that is followed"):
        (store.feature(silent[0]) if silent else feature).effect(tiny_lm, None if silent else 0)


def _crosscoder():
    sae = CrosscoderSAE(CrosscoderConfig(24, 4, sparsity="l1", normalize="none"), 32, seed=1, n_sources=2)
    with torch.no_grad():
        sae.W_dec[0].mul_(torch.linspace(0.1, 3.0, 24)[:, None])
    return sae, ["blocks.0.hook_resid_post", HOOK]


def _transcoder():
    config = TranscoderConfig(24, 4, normalize="none", hook_name_out="blocks.1.hook_mlp_out")
    return TranscoderSAE(config, 32, d_out=32), "blocks.1.ln2.hook_normalized"


@pytest.mark.parametrize("make", [_crosscoder, _transcoder])
def test_features_of_several_hooks_are_refused_in_a_sentence(tiny_lm, tmp_path, make):
    sae, hooks = make()
    sae.provenance = Provenance(origin={"hook_name": hooks} if isinstance(hooks, str) else {"hook_names": hooks})
    store = collect(sae, tiny_lm, tmp_path / "features", hooks)
    with pytest.raises(ValueError, match="cannot be zeroed at"):
        store.feature(3).effect(tiny_lm)
    with pytest.raises(ValueError, match="needs the feature's activation"):  # as the edits say
        store.feature(3).handle.ablate()


def test_the_page_measures_and_shows_it_later_without_a_model(open_page, hostile_run, tiny_lm, tmp_path, monkeypatch):
    run = Path(shutil.copytree(hostile_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache")))
    index = load_features(run).table("n_fired", limit=1)[0]["feature"]
    monkeypatch.setattr(state, "load_model", lambda name: tiny_lm)
    app = open_page("feature", run, feature=index)
    assert "Less likely without it" not in html_of(app)
    {button.key: button for button in app.button}["measure"].click().run()
    assert not app.exception and not app.error
    kept = load_features(run).feature(index).effect()
    assert kept is not None and kept.control == 0.0 and effect_html(kept) in html_of(app)
    monkeypatch.setattr(state, "load_model", lambda name: pytest.fail("no model is needed"))
    app = open_page("feature", run, feature=index)
    assert effect_html(kept) in html_of(app) and {b.key: b.label for b in app.button}["measure"] == "Measure again"
    app = open_page("feature", run, feature=(index + 1) % 96)
    assert "Less likely without it" not in html_of(app)
