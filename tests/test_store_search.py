"""What leads from one thing to features: words, tokens, directions, co-activation, labels; and the sample behind it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import saelab
from saelab.errors import StoreError
from saelab.evaluation.heldout import open_score_stream
from saelab.features.collecting.document_positions import document_positions
from saelab.features.collecting.feature_words import FeatureWords, _End
from saelab.features.collecting.labelling import Labeller, Peaks
from saelab.features.collecting.signed import SignedAccumulator
from saelab.features.collecting.words import Words
from saelab.features.quantiles import N_GROUPS, PER_GROUP, share_below, value_at
from saelab.kernels.sparse_acts import SparseActs

HOOK = "blocks.1.hook_resid_post"
OLD = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def texts():
    words = ["rain", "wind", "thunder", "moon", "river", "old mill", "stars", "don't", "light", "\u6f22\u5b57"]
    return [f"The {words[i % 10]} and the {words[(3 * i) % 10]} came to pass {i}. " * 3 for i in range(60)]


@pytest.fixture(scope="module")
def sae():
    return saelab.saes.TopKSAE(saelab.saes.TopKConfig(d_sae=64, k=4, normalize="none"), 32)


@pytest.fixture(scope="module")
def store(sae, tiny_lm, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    saelab.save_sae(sae, folder / "sae")
    sae = saelab.load_sae(folder / "sae")
    options = {"hook_name": HOOK, "ctx_len": 32, "progress": False}
    return saelab.collect_features(sae, tiny_lm, texts, out_dir=folder / "features", **options)


@pytest.fixture(scope="module")
def dense(sae, tiny_lm, texts):
    """Every code of the pass, and the token ids and documents, `(tokens, ...)`."""
    stream = open_score_stream(sae, tiny_lm, texts, hook_name=HOOK, ctx_len=32)
    with torch.no_grad():
        codes = [(sae.encode(acts[keep]).to_dense(), tokens.ids[keep]) for tokens, acts, keep in stream]
    return torch.cat([c for c, _ in codes]), torch.cat([i for _, i in codes])


def alive(store):
    return [i for i in range(len(store)) if store.feature(i).n_fired]


def test_a_label_is_made_of_words_at_the_peaks(store):
    labelled = [store.feature(i) for i in alive(store)]
    assert all(feature.label for feature in labelled)
    assert all(0 < feature.row["label_share"] <= 1 for feature in labelled)
    assert [f.label for i in set(range(64)) - set(alive(store)) if (f := store.feature(i)).label] == []
    everything = " ".join(one.text for f in labelled for one in f.examples()).casefold()
    for feature in labelled:
        words = feature.label.split(" (")[-1].rstrip(")").split(" \u2192 ")[0].split(", ")
        assert all(word.casefold() in everything or not word.isalnum() for word in words), feature.label


def test_search_finds_what_stands_in_labels_peaks_and_around(store):
    feature = store.feature(alive(store)[3])
    word = next(word for word in feature.label.replace("(", " ").replace(",", " ").split() if word.isalpha())
    assert feature.feature in [row["feature"] for row in store.search(word)]
    assert store.search(word)[0].keys() == store.table()[0].keys() | {"found_in"}
    around = {row["feature"] for row in store.search("thunder")}
    for index in around:
        shown = [one.text for kind in ("top", "uniform") for one in store.feature(index).examples(kind=kind)]
        assert any("thunder" in text for text in shown) or "thunder" in store.feature(index).label
    assert store.search("xyzzy plugh") == []
    assert {row["feature"] for row in store.search("thunder xyzzy")} == around
    assert len(store.search("the", limit=3)) == 3
    with pytest.raises(ValueError, match="at least one word"):
        store.search("   ")


def test_labels_and_peaks_outrank_the_text_around(sae, tiny_lm, texts, tmp_path, monkeypatch):
    """However often the word stands there."""
    around, long = "storm " * 60, "other words " * 90
    rows = [(5, "rain", "rain", around), (6, "wind", "storm", long), (7, "storm", "gale", long), (8, "sea", "", around)]
    monkeypatch.setattr(FeatureWords, "search_rows", lambda self: iter(rows))
    planted = saelab.collect_features(
        sae, tiny_lm, texts[:12], out_dir=tmp_path / "features", hook_name=HOOK, ctx_len=32, progress=False
    )
    found = [row["feature"] for row in planted.search("storm")]
    assert found[:2] == [7, 6] and sorted(found[2:]) == [5, 8]
    assert [row["feature"] for row in planted.search("storm", limit=1)] == [7]


@pytest.mark.parametrize(
    "words", ['"', "a OR", "NEAR(", "'; DROP TABLE feature; --", "*", "label:x", "\x00", "\u6f22\u5b57", "\U0001f600"]
)
def test_any_text_can_be_searched_for(store, words):
    assert isinstance(store.search(words), list)


def test_features_on_a_token_are_those_whose_peaks_it_is(store, tiny_lm):
    feature = store.feature(alive(store)[0])
    token = feature.row["peak_token"]
    rows = store.firing_on(token)
    assert feature.feature in [row["feature"] for row in rows]
    assert [row["peak_share"] for row in rows] == sorted((row["peak_share"] for row in rows), reverse=True)
    (piece,) = store.pieces([token])
    assert store.firing_on(piece.decode()) == rows
    assert store.firing_on("no such token") == [] and store.firing_on(10**9) == []
    with pytest.raises(ValueError, match="needs a token"):
        store.firing_on("")


def test_neighbours_are_the_largest_cosines(store, sae):
    for by, W in (("decoder", sae.W_dec), ("encoder", sae.W_enc)):
        cosines = torch.cosine_similarity(W[7:8], W, dim=1).detach()
        cosines[7] = -2
        wanted = cosines.topk(5)
        found = store.neighbours(7, by=by, k=5)
        assert [one["feature"] for one in found] == wanted.indices.tolist()
        assert [one["cosine"] for one in found] == pytest.approx(wanted.values.tolist(), abs=1e-5)
    assert len(store.neighbours(7, k=1000)) == 63
    calls = (partial(store.neighbours, 7), store.feature(7).neighbours, partial(store.coactivation, 7))
    for call, k in product(calls, (0, -1)):
        with pytest.raises(ValueError, match=f"k={k} must be at least 1"):
            call(k=k)
    for call in (lambda: store.neighbours(7, by="name"), lambda: store.neighbours(64), lambda: store.coactivation(-1)):
        with pytest.raises(ValueError):
            call()


def test_coactivation_counts_tokens_on_which_both_fire(store, dense):
    fired = dense[0] != 0
    for feature in alive(store)[::9]:
        for row in store.coactivation(feature, k=6):
            other, this = fired[:, row["feature"]], fired[:, feature]
            both, either = int((other & this).sum()), int((other | this).sum())
            assert row["n_both"] == both and row["jaccard"] == pytest.approx(both / either)
            assert row["p_given_this"] == pytest.approx(both / int(this.sum()))
            assert row["p_this_given"] == pytest.approx(both / int(other.sum()))
            assert row["lift"] == pytest.approx(both * len(fired) / (int(this.sum()) * int(other.sum())))


def test_quantile_examples_come_from_all_of_the_range(store, dense):
    for feature in alive(store)[::7]:
        values = dense[0][:, feature][dense[0][:, feature] > 0]
        found = store.feature(feature).examples(kind="quantile")
        assert len({(one.sequence, one.position) for one in found}) == len(found) <= N_GROUPS * PER_GROUP
        groups = [one.quantile for one in found]
        assert groups == sorted(groups, reverse=True)
        if len(values) > 60:
            assert {one.quantile for one in found} == {(i / N_GROUPS, (i + 1) / N_GROUPS) for i in range(N_GROUPS)}
            for one in found:
                share = float((values < one.value).float().mean())
                assert one.quantile[0] - 0.2 <= share <= one.quantile[1] + 0.2
    histogram = store.feature(alive(store)[0]).histogram
    assert value_at(histogram, 0.0) == pytest.approx(float(histogram.edges[0]))
    assert share_below(histogram, np.array([value_at(histogram, 0.37)]))[0] == pytest.approx(0.37)


def test_uniform_examples_and_near_misses(store, dense):
    feature = store.feature(alive(store)[0])
    uniform = feature.examples(kind="uniform")
    assert len(uniform) == min(64, feature.n_fired) and all(one.value > 0 for one in uniform)
    for index in range(0, 64, 5):
        for miss in store.feature(index).examples(kind="near_miss"):
            assert miss.value <= 0 and miss.values[miss.peak] == 0
    with pytest.raises(ValueError, match="expected one of top, bottom, quantile, uniform, near_miss"):
        feature.examples(kind="best")


def test_the_features_of_a_text_are_those_that_fire(store, sae, tiny_lm):
    text = "The moon and the thunder"
    ids = tiny_lm.to_ids(text)
    x = next(iter(tiny_lm.stream_activations([ids], [HOOK])))[HOOK][0]
    codes = sae.encode(x).to_dense().detach()
    found = store.top_features(tiny_lm, text, k=64)
    assert len(found) == len(codes)
    for row, token in zip(codes, found, strict=True):
        assert {one["feature"] for one in token} == set(row.nonzero().flatten().tolist())
        assert all(one["value"] == pytest.approx(float(row[one["feature"]])) for one in token)
        scores = [one["percentile"] * one["surprise"] for one in token]
        assert scores == sorted(scores, reverse=True) and all(0 <= one["percentile"] <= 1 for one in token)


def test_hand_labels_outrank_and_are_searched_first(store):
    index = alive(store)[5]
    assert store.feature(index).label == store.feature(index).row["label"]
    notes = store.annotations
    notes.add(index, "model_label", "a machine's guess")
    assert store.feature(index).label == "a machine's guess"
    notes.add(index, "label", "weather <b>and</b> moods")
    assert store.feature(index).label == "weather <b>and</b> moods"
    assert store.search("moods")[0]["feature"] == index
    notes.add(index, "list", True, name="starred")
    assert store.lists == {"starred": [index]}
    notes.add(index, "list", None, name="starred")
    notes.add(index, "label", None)
    notes.add(index, "model_label", None)
    assert store.lists == {} and store.feature(index).label == store.feature(index).row["label"]
    notes.add(index, "score", {"auroc": 0.9, "n": 40}, name="detection")
    assert store.feature(index).scores == {"detection": {"auroc": 0.9, "n": 40}}


def test_words_are_whole_and_stems_are_shared():
    pieces = dict(
        enumerate([b" cel", b"estial", b" moon", b"s", b",", b" the", b" don", b"'t", b" \xe6\xbc", b"\n", b"\xa2"])
    )
    ids = np.array([[0, 1, 4, 2, 3, 9, 6, 7, 5, 8, 10]])
    words = Words(ids, pieces)
    assert [words.word(token) for token in range(11)] == ["celestial"] * 2 + [
        ",",
        "moons",
        "moons",
        "\u21b5",
        "don",
        "'t",
        "the",
        "\u6f22",
        "\u6f22",
    ]
    assert words.stem("Moons") == words.stem("moon") == "moon" and words.stem("is") == "is"
    assert words.stem("worries") == "worr" and words.stem("walked") == words.stem("walking") == "walk"
    counts, n = words.frequencies()
    assert counts["moon"] == 1 and n == 8


def labelled(peaks, ids, pieces, positions=None):
    labeller = Labeller(Words(np.array(ids), pieces))
    tokens = np.array(peaks)
    positions = tokens % len(ids[0]) if positions is None else positions
    return labeller.label(
        Peaks(tokens, np.ones(len(tokens)), np.ones(len(tokens)), np.ones(len(tokens), dtype=bool)), positions
    )


def test_labels_name_words_what_follows_and_positions():
    pieces = dict(enumerate([b" moon", b" star", b" the", b" don", b"'t", b" sky", b" of"]))
    rng = np.random.default_rng(0)
    filler = rng.choice([2, 5, 6], (40, 16))
    stars = filler.copy()
    stars[:, 5], stars[:20, 9] = 0, 1
    peaks = [*(16 * i + 5 for i in range(0, 40, 2)), *(16 * i + 9 for i in range(0, 20, 2))]
    found = labelled(peaks, stars, pieces, np.arange(30) % 14)
    assert found.text == "moon, star" and found.share == pytest.approx(1.0) and (found.sharpness or 0) > 2
    assert found.peak_tokens[0][:3] == (0, 20, pytest.approx(2 / 3)) and sorted(set(found.words)) == ["moon", "star"]
    followed = filler.copy()
    followed[:, 5], followed[:, 6] = 3, 4
    found = labelled([16 * i + 5 for i in range(20)], followed, pieces, np.arange(20) % 14)
    assert found.text == "don \u2192 't"
    dull = labelled([16 * i + 2 for i in range(40)], filler, pieces, np.arange(40) % 14)
    assert dull.sharpness is not None and dull.sharpness < 0.2
    words = dict(enumerate([b" the", *(f" word{chr(97 + i)}".encode() for i in range(10))]))
    once = np.zeros((10, 16), dtype=int)
    once[:, 5] = np.arange(1, 11)
    assert labelled([16 * i + 5 for i in range(10)], once, words, np.arange(10)).sharpness == 0.0  # none comes twice
    second = labelled([16 * i + 1 for i in range(40)], filler, pieces)
    assert second.position == 1 and second.text is not None and second.text.startswith("token 2 of a context (")
    assert labelled([5], stars, pieces).sharpness is None
    assert labelled([], stars, pieces).text is None


def test_positions_in_documents_leave_out_bos():
    docs = np.array([[0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 2, -1]])
    assert document_positions(docs, 0).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0, -1]
    assert document_positions(docs, 1).tolist() == [0, 0, 1, 0, 1, 1, 2, 3, 4, 4, 0, -1]


def test_examples_say_where_they_stand_in_their_document(store, tiny_lm, texts):
    starts = {}
    for feature in alive(store)[:20]:
        for one in store.feature(feature).examples():
            ids = tiny_lm.tokenizer(texts[one.document]).input_ids
            assert ids[one.document_position] == one.token_ids[one.peak]
            starts[one.document] = one.document_position
    assert len(starts) > 5


def test_earlier_stores_open_and_say_how_to_renew(store, tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(store.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    old = saelab.load_features(folder)
    assert old.feature(0).row["label"] is None and old.table(limit=2)
    for call in (lambda: old.search("moon"), lambda: old.firing_on("a"), lambda: old.coactivation(0),
                 lambda: old.feature(0).examples(kind="quantile")):  # fmt: skip
        with pytest.raises(StoreError, match="earlier saelab.*saelab features .*--renew"):
            call()


def test_what_a_feature_does_most_strongly_finds_it(store):
    """By the token of its strongest example, and by the word that stands there."""
    for index in alive(store):
        strongest = next(iter(store.feature(index).examples(1)))
        assert index in [row["feature"] for row in store.firing_on(strongest.token_ids[strongest.peak], 1000)]


def test_a_word_counts_by_the_squared_activation_there():
    """Many weak peaks do not hide a few strong ones; sharpness is still measured on the uniform sample alone."""
    pieces = dict(enumerate([b" rain", b" the", b" of", b" word"]))
    ids = np.full((12, 8), 3)
    ids[:10, 4], ids[10:, 4] = 1, 0
    tokens = np.arange(12) * 8 + 4
    values = np.where(np.arange(12) < 10, 1.0, 9.0)
    is_uniform = np.arange(12) < 11
    found = Labeller(Words(ids, pieces)).label(Peaks(tokens, values, values**2, is_uniform), tokens % 8 + np.arange(12))
    assert found.text == "rain, the"
    assert found.peak_tokens[0] == (0, 2, pytest.approx(162 / 172), 9.0)
    assert found.words.count("rain") == 19 and found.words.count("the") == 1
    alone = Labeller(Words(ids, pieces)).label(
        Peaks(tokens[:11], values[:11], values[:11] ** 2, is_uniform[:11]), tokens[:11] % 8 + np.arange(11)
    )
    assert found.sharpness == alone.sharpness


def test_a_search_says_where_it_found_the_words(store):
    feature = store.feature(alive(store)[3])
    word = next(word for word in feature.label.replace("(", " ").replace(",", " ").split() if word.isalpha())
    feature.store.annotations.add(feature.feature, "note", "about zebras")
    try:
        assert [(row["feature"], row["found_in"]) for row in store.search("zebras")] == [(feature.feature, "note")]
        assert {row["feature"]: row["found_in"] for row in store.search(word)}[feature.feature] == "peaks"
    finally:
        feature.store.annotations.add(feature.feature, "note", None)
    assert store.search("zebras") == []


def test_sampled_peaks_stand_for_all_firings():
    """Of 100 weak firings and 3 strong ones, each sampled peak carries the squared activation of those it stands for."""
    ctx_len, strong = 8, (10, 50, 90)
    state = SignedAccumulator(1, ctx_len, 20)
    tokens = torch.arange(103) * ctx_len + 4
    values = torch.ones(103).index_fill(0, torch.tensor(strong), 9.0)
    offsets = torch.arange(104)
    state.update(SparseActs(values, torch.zeros(103, dtype=torch.int64), offsets, 1), tokens, torch.arange(103))
    peaks = _End(state.ends[1]).peaks(0)
    is_strong = peaks.values > 5
    assert is_strong.sum() == 3 and len(peaks.values) < 103
    assert peaks.energy[is_strong].sum() == pytest.approx(3 * 81) and peaks.energy[~is_strong].sum() == pytest.approx(
        100
    )


def test_a_label_counts_before_a_note(store):
    index = alive(store)[2]
    for kind in ("label", "note"):
        store.annotations.add(index, kind, "zebra crossing")
    try:
        assert [(row["feature"], row["found_in"]) for row in store.search("zebra")] == [(index, "label")]
    finally:
        for kind in ("label", "note"):
            store.annotations.add(index, kind, None)
