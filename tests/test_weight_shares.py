"""What decoder rows say by themselves: heads, sources of a crosscoder, promoted tokens as z-scores; and the histogram beside."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from pages import html_of

import saelab
from saelab.errors import StoreError
from saelab.evaluation.crosscoder import compare_decoders
from saelab.features.collecting.promoted import top_logits
from saelab.features.histogram_html import Quantile, histogram_html, quantiles_of
from saelab.features.numbers import signed
from saelab.features.quantiles import value_at
from saelab.features.records import Histogram
from saelab.features.schema import N_BINS, bin_edges, bin_name
from saelab.features.store import load_features
from saelab.saes import CrosscoderConfig, CrosscoderSAE, TopKConfig, TopKSAE

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
TEXTS = [f"The river {i} runs past the old mill, and the man with the red hat said {i}." for i in range(30)]


def collected(sae, lm, run, hook):
    saelab.save_sae(sae, run / "sae")
    sae = saelab.load_sae(run / "sae")
    return saelab.collect_features(sae, lm, TEXTS, out_dir=run / "features", hook_name=hook, ctx_len=32, progress=False)


@pytest.fixture(scope="module")
def at_heads(tiny_lm, tmp_path_factory):
    sae = TopKSAE(TopKConfig(d_sae=24, k=4, normalize="none"), 32, seed=1)
    with torch.no_grad():
        sae.W_dec[5] = torch.cat([torch.zeros(8), torch.full((8,), 3.0), torch.zeros(8), torch.full((8,), 1.0)])
    return collected(sae, tiny_lm, tmp_path_factory.mktemp("heads"), "blocks.1.attn.hook_z")


@pytest.fixture(scope="module")
def crosscoder(tiny_lm, tmp_path_factory):
    sae = CrosscoderSAE(CrosscoderConfig(24, 4, sparsity="l1", normalize="none"), 32, seed=1, n_sources=2)
    with torch.no_grad():
        sae.W_dec[0].mul_(torch.linspace(0.0, 3.0, 24)[:, None])
    return collected(sae, tiny_lm, tmp_path_factory.mktemp("crosscoder"), HOOKS)


def test_each_heads_share_of_a_row_at_hook_z(at_heads):
    assert at_heads.feature(5).head_shares == pytest.approx([0.0, 0.75, 0.0, 0.25])
    for index in range(24):
        norms = at_heads.weights["W_dec"][index].reshape(4, 8).astype(float)
        norms = np.sqrt((norms**2).sum(1))
        assert at_heads.feature(index).head_shares == pytest.approx((norms / norms.sum()).tolist())
        assert at_heads.feature(index).source_norms is None


def test_the_norms_of_a_crosscoders_sources(crosscoder):
    compared = compare_decoders(crosscoder.sae)
    for index in range(24):
        found = crosscoder.feature(index).source_norms
        assert [one["source"] for one in found] == HOOKS and crosscoder.feature(index).head_shares is None
        assert [one["norm"] for one in found] == pytest.approx(
            [float(compared.norms_a[index]), float(compared.norms_b[index])], abs=1e-6
        )
        assert found[1]["share"] == pytest.approx(float(compared.share_b[index]), abs=1e-6)
    assert crosscoder.feature(0).source_norms[0]["share"] == 0.0


def test_other_saes_have_neither_and_old_stores_say_how_to_renew(hostile_run, at_heads, monkeypatch):
    feature = load_features(hostile_run).feature(3)
    assert feature.head_shares is None and feature.source_norms is None
    monkeypatch.delitem(at_heads.manifest, "n_heads")
    with pytest.raises(StoreError, match="--renew"):
        _ = at_heads.feature(3).head_shares


@pytest.mark.parametrize("kind", ["heads", "sources"])
def test_the_page_shows_them(kind, at_heads, crosscoder, open_page):
    store = {"heads": at_heads, "sources": crosscoder}[kind]
    app = open_page("feature", store.folder.parent, feature=5)
    assert not app.exception and not app.error
    shown, titles = html_of(app), [one.value for one in app.subheader]
    if kind == "heads":
        assert "Attention heads" in titles and re.findall(r"<td>(\d)</td>.*?<span>([\d.]+%)", shown)[:2] == [
            ("1", "75.00%"), ("3", "25.00%"),
        ]  # fmt: skip
    else:
        assert "Sources" in titles and HOOKS[0] in shown
        assert any("cannot be zeroed at" in caption.value.replace("\\", "") for caption in app.caption)


def test_promoted_tokens_are_z_scores_among_features(tiny_lm, tmp_path):
    sae = TopKSAE(TopKConfig(d_sae=40, k=4, normalize="none"), 32, seed=4)
    found = top_logits(sae, tiny_lm, HOOKS[1])
    assert found is not None
    logits = (sae.W_dec @ tiny_lm.logit_weights().float().T).detach()  # (d_sae, vocab)
    z = (logits - logits.mean(0)) / logits.std(0, correction=0)
    for side, values in (("positive", z.topk(15, 1)), ("negative", z.topk(15, 1, largest=False))):
        assert torch.allclose(found[f"z_{side}"], values.values, atol=1e-3)
        ids = found[f"z_{side}_ids"]
        assert torch.allclose(found[f"z_{side}_logits"], logits.gather(1, ids), atol=1e-5)
    store = collected(sae, tiny_lm, tmp_path, HOOKS[1])
    promoted = store.feature(7).promoted
    assert [token.z for token in promoted.positive] == pytest.approx(found["z_positive"][7].tolist(), abs=1e-4)
    assert [token.logit for token in promoted.negative] == pytest.approx(
        found["z_negative_logits"][7].tolist(), abs=1e-4
    )
    mirrored, last = promoted.mirrored().positive[0], promoted.negative[0]
    assert last.z is not None and last.z < 0 and mirrored.z == -last.z and mirrored.text == last.text
    assert last.logit is not None and mirrored.logit == -last.logit
    assert (
        f"{signed(promoted.positive[0].z, 1)}, {signed(promoted.positive[0].logit, 2)}"
        in store.feature(7)._repr_html_()
    )


def test_promoted_tokens_of_an_older_store_are_by_logit(hostile_run):
    store = load_features(hostile_run)
    arrays = {name: values for name, values in store.arrays(3, "logits").items() if not name.startswith("z_")}
    store.arrays = lambda feature, kind: arrays
    assert [(one.text, one.logit) for one in store.promoted(3).positive] == store.logits(3).positive
    assert {one.z for one in store.promoted(3).negative} == {None}


def test_bins_have_the_names_of_their_edges():
    edges = bin_edges()
    assert [bin_name(edge) for edge in edges[:-1]] == [str(i) for i in range(N_BINS)]
    assert (
        bin_name(edges[9] * 1.01) == "9" and bin_name(np.nextafter(edges[10], 0)) == "9" and bin_name(-edges[9]) == "-9"
    )
    assert bin_name(1e-30) == "0" and bin_name(1e30) == str(N_BINS - 1)


def test_the_histogram_marks_the_bin_of_every_token(hostile_run):
    store = load_features(hostile_run)
    for row in store.table("n_fired", limit=5):
        feature = store.feature(row["feature"])
        card = feature._repr_html_()
        lit, bars = (set(re.findall(f'{name}="([^"]+)"', card)) for name in ("bdi[^>]*data-at", "span[^>]*data-bin"))
        assert lit and lit <= bars
        for name in lit:
            assert f':has([data-at="{name}"]:is(:hover,:focus)) [data-bin="{name}"]' in card
        counts = {bin_name(edge): n for edge, n in zip(feature.histogram.edges, feature.histogram.counts, strict=False)}
        assert {name for name, n in counts.items() if n} == bars


def test_quantiles_stand_where_their_values_lie(hostile_run):
    store = load_features(hostile_run)
    end = store.feature(store.table("n_fired", limit=1)[0]["feature"]).ends[0]
    found = {one.name: one.value for one in quantiles_of(end, end.histogram)}
    assert (
        found["p50"] == value_at(end.histogram, 0.5) < found["p90"] < found["p99"] == end.p99 <= found["max"] == end.max
    )
    markup = histogram_html(
        Histogram(np.array([1.0, 2.0, 4.0]), np.array([3, 1])), [Quantile("p50", 2.0, 3), Quantile("max", 4.0, 0)]
    )
    assert re.findall(r'left:([\d.]+)%"><span>(\w+)', markup) == [("50.00", "p50"), ("100.00", "max")]
    assert "grid-template-columns:1.000fr 1.000fr" in markup and json.loads(f'"{_label(markup)}"').endswith(
        "p50 2.00, max 4.00"
    )


def _label(markup):
    return re.findall('aria-label="([^"]*)"', markup)[0]
