"""Features of two SAEs matched by direction and firing, against brute force and planted truth; and the Compare page."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_runs import HOOK, write_texts

import saelab
from saelab.evaluation import compare_decoders
from saelab.features import collect_snapshots, load_features
from saelab.features import matching as matching_module
from saelab.features.changes import changes
from saelab.features.matching import Counterparts, Matching, match
from saelab.features.pairs import ORDERS, SHOWS, pairs
from saelab.features.sides import CLASSES, sides, sources_of
from saelab.runs import find_snapshots, follows, sae_run
from saelab.saes import CrosscoderConfig, CrosscoderSAE, TopKConfig, TopKSAE

HOOKS = ["blocks.0.hook_resid_post", HOOK]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm):
    """A RUN with two SAEs of one hook, of which one kept snapshots, and a crosscoder of two hooks."""
    folder = tmp_path_factory.mktemp("compare") / "run"
    folder.mkdir()
    texts = write_texts(folder / "texts.jsonl")
    cache = saelab.harvest(tiny_lm, texts, HOOKS, 4_000, folder / "cache", ctx_len=64, progress=False)
    for name, config, seed, every in (
        ("sae-a", TopKConfig(96, 4), 0, 20),
        ("sae-b", TopKConfig(64, 4), 1, None),
        ("sae-cross", CrosscoderConfig(d_sae=48, k=4), 0, None),
    ):
        train = saelab.TrainConfig(
            n_tokens=12_800, batch_size=256, warmup_steps=2, seed=seed, snapshot_every=every, device="cpu"
        )
        hook = None if name == "sae-cross" else HOOK
        sae = saelab.train(config, cache, train, folder / name, hook_name=hook, progress=False)
        n_tokens = 512 if name == "sae-b" else 1024
        saelab.collect_features(
            sae, tiny_lm, out_dir=sae_run(folder / name).features_dir, n_tokens=n_tokens, progress=False
        )
    collect_snapshots(folder / "sae-a", tiny_lm, n_tokens=384, progress=False)
    return folder


def an_sae(rows):
    sae = TopKSAE(TopKConfig(len(rows), 1), rows.shape[1])
    with torch.no_grad():
        sae.W_dec.copy_(torch.from_numpy(rows))
    return sae


def brute_force(a, b):
    """Index and cosine of the most similar row of b for each of a, one by one."""
    found = []
    for row in a:
        cosines = [float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)) for other in b]
        found.append((int(np.argmax(cosines)), max(cosines)))
    return [list(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("block", [1, 50, 2**25])
def test_a_planted_permutation_is_found_and_what_has_no_counterpart(monkeypatch, block):
    monkeypatch.setattr(matching_module, "BLOCK", block)
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(40, 32)).astype(np.float32)
    order = draw.permutation(40)
    others = rows[order] * draw.uniform(0.5, 2, size=(40, 1)) + 0.02 * draw.normal(size=(40, 32))
    others = np.concatenate([others, draw.normal(size=(3, 32))]).astype(np.float32)
    others[5] = draw.normal(size=32)  # the counterpart of order[5] is gone
    matching = match(an_sae(rows), an_sae(others))
    best, cosine = brute_force(rows, others)
    assert matching.of_a.best.tolist() == best
    np.testing.assert_allclose(matching.of_a.cosine, cosine, atol=1e-5)
    best, cosine = brute_force(others, rows)
    assert matching.of_b.best.tolist() == best
    np.testing.assert_allclose(matching.of_b.cosine, cosine, atol=1e-5)
    kept = [i for i in range(40) if i != 5]
    assert (matching.of_a.best[order[kept]] == kept).all() and matching.mutual[order[kept]].all()
    assert matching.of_a.missing().tolist() == [order[5]]
    assert sorted(matching.of_b.missing().tolist()) == [5, 40, 41, 42]
    assert (np.diff(matching.of_b.cosine[matching.of_b.missing()]) >= 0).all()
    assert matching.n_shared == 0 and np.isnan(matching.of_a.jaccard).all()


def test_widths_that_differ_are_refused():
    with pytest.raises(ValueError, match="have widths 8 and 6"):
        match(an_sae(np.eye(8, dtype=np.float32)), an_sae(np.eye(6, dtype=np.float32)))


def test_firings_are_compared_on_the_tokens_that_both_sampled(run, tiny_lm):
    """Against the SAEs themselves, on the contexts of the smaller store."""
    stores = [load_features(run / "features-a"), load_features(run / "features-b")]
    matching = match(*stores)
    n = min(len(store.contexts) for store in stores)
    fired = []
    for store in stores:
        tokens = store.sample["tokens"]
        here = tokens < n * 64
        ids = torch.from_numpy(store.contexts[:n].astype(np.int64))
        x = torch.cat([found[HOOK] for found in tiny_lm.stream_activations([ids], [HOOK])]).flatten(0, 1).float()
        fired.append(
            (tokens[here], store.sae.encode(x[torch.from_numpy(tokens[here])]).to_dense().detach().numpy() != 0)
        )
    assert (fired[0][0] == fired[1][0]).all() and matching.n_shared == len(fired[0][0]) > 300
    (_, of_a), (_, of_b) = fired
    for i, j in enumerate(matching.of_a.best.tolist()):
        if j < 0:
            assert stores[0].row_of(i)["n_fired"] == 0 and np.isnan(matching.of_a.jaccard[i])
            continue
        both, either = (of_a[:, i] & of_b[:, j]).sum(), (of_a[:, i] | of_b[:, j]).sum()
        np.testing.assert_equal(matching.of_a.jaccard[i], both / either if either else np.nan)
        np.testing.assert_equal(matching.of_a.within[i], both / of_a[:, i].sum() if of_a[:, i].any() else np.nan)
    assert (matching.of_a.n_fired == of_a.sum(0)).all() and (matching.of_b.n_fired == of_b.sum(0)).all()
    same = match(stores[0], stores[0])
    alive = same.of_a.alive
    assert (same.of_a.best[alive] == np.flatnonzero(alive)).all() and same.mutual.sum() == alive.sum()
    assert (same.of_a.jaccard[same.of_a.n_fired > 0] == 1).all()


def test_other_contexts_are_not_compared(run, tiny_lm, tmp_path):
    store = load_features(run / "features-b")
    texts = ["Something else that was said of the weather and the river. " * 20] * 8
    other = saelab.collect_features(store.sae, tiny_lm, texts, out_dir=tmp_path / "other", progress=False)
    assert match(store, other).n_shared == 0
    assert match(store, other).mutual.sum() > 0


def made(best, cosine, within, alive=None):
    n = len(best)
    alive = np.ones(n, dtype=bool) if alive is None else np.array(alive)
    return Counterparts(
        np.array(best), np.array(cosine, dtype=np.float32), np.full(n, 0.5), np.array(within), np.full(n, 9), alive
    )


def test_born_died_split_and_merged_by_hand():
    """a0 is split into b0 and b1, b2 fires elsewhere; a1 died; a2 and a3 merge in b3; b4 was born; a4 and b5 never fired."""
    of_a = made([0, 4, 3, 3, -1], [0.9, 0.1, 0.8, 0.75, np.nan], [0.5, 0.0, 0.9, 0.5, np.nan], [1, 1, 1, 1, 0])
    of_b = made(
        [0, 0, 0, 2, 1, -1], [0.9, 0.8, 0.7, 0.8, 0.1, np.nan], [0.5, 0.6, 0.49, 0.9, 0.0, np.nan], [1] * 5 + [0]
    )
    found = changes(Matching(of_a._replace(alive=of_a.alive > 0), of_b._replace(alive=of_b.alive > 0), 9))
    assert (found.born.tolist(), found.died.tolist()) == ([4], [1])
    assert (found.split, found.merged) == ({0: [0, 1]}, {3: [2, 3]})
    strict = changes(Matching(of_a._replace(alive=of_a.alive > 0), of_b._replace(alive=of_b.alive > 0), 9), 0.78)
    assert (strict.split, strict.merged, strict.died.tolist()) == ({0: [0, 1]}, {}, [1, 3])
    with pytest.raises(ValueError, match="cosine=1.5 must be between 0 and 1"):
        changes(Matching(of_a, of_b, 9), 1.5)


def test_pairs_are_chosen_and_ordered(run):
    matching = match(load_features(run / "features-a"), load_features(run / "features-b"))
    for show in SHOWS:
        for order in ORDERS:
            for pair in pairs(matching, show, order, 0.5):
                assert matching.of_a.best[pair.a] == pair.b or matching.of_b.best[pair.b] == pair.a
                assert pair.mutual == (matching.of_a.best[pair.a] == pair.b and matching.of_b.best[pair.b] == pair.a)
    alike = [pair.cosine for pair in pairs(matching, "all", "alike")]
    assert alike == sorted(alike, reverse=True) and len(alike) == matching.of_a.alive.sum()
    apart = [pair.jaccard for pair in pairs(matching, "mutual", "apart")]
    known = [value for value in apart if value == value]
    assert known == sorted(known) and all(value != value for value in apart[len(known) :])
    assert [pair.b for pair in pairs(matching, "only_b", "unlike")] == matching.of_b.missing().tolist()
    with pytest.raises(ValueError, match="show='none'"):
        pairs(matching, "none")


def test_the_sides_of_a_crosscoder_are_those_of_the_evaluation(run):
    store = load_features(run / "features-cross")
    sae = store.sae
    assert isinstance(sae, CrosscoderSAE)
    ours, theirs = sides(store), compare_decoders(sae)
    np.testing.assert_allclose(ours.relative, theirs.delta.numpy(), atol=1e-6)
    np.testing.assert_allclose(ours.cosine, theirs.cosine.numpy(), atol=1e-6)
    assert ours.kind.tolist() == theirs.classes.tolist() and sources_of(store) == HOOKS
    for kind in CLASSES:
        assert len(ours.features(kind)) == theirs.counts()[kind]
    assert sources_of(load_features(run / "features-a")) == []
    for wrong in ((0, 0), (0, 2)):
        with pytest.raises(ValueError, match="must be two different ones of the 2"):
            sides(store, *wrong)


def test_snapshots_follow_each_other(run):
    first, second = find_snapshots(run / "sae-a")
    end = sae_run(run / "sae-a")
    assert follows(first, second) and follows(first, end) and follows(second, end)
    assert not follows(second, first) and not follows(end, first) and not follows(first, sae_run(run / "sae-b"))


def table_of(app):
    return next(element.proto.body for element in app.get("html") if "sa-pairs" in element.proto.body)


def test_two_saes_are_shown_side_by_side(open_page, run):
    app = open_page("compare", run, sae="sae-a", **{"with": "sae-b"}, order="alike")
    assert not app.exception and not app.error and not app.warning
    assert app.title[0].value == "Compare" and len(app.get("plotly_chart")) == 1
    matching = match(load_features(run / "features-a"), load_features(run / "features-b"))
    shown = {metric.label: metric.value for metric in app.metric}
    assert shown["Most alike both ways"] == str(matching.mutual.sum())
    assert shown["Only in second"] == str(len(changes(matching).born))
    best = pairs(matching, "mutual", "alike")[0]
    body = table_of(app)
    assert body.count("<tr>") == 1 + min(25, matching.mutual.sum())
    assert f'href="feature?sae=sae-a&amp;feature={best.a}"' in body
    assert f'href="feature?sae=sae-b&amp;feature={best.b}"' in body
    {box.label: box for box in app.selectbox}["Second"].set_value("sae-cross").run()
    assert "have widths 32 and 64" in app.error[0].value


def test_snapshots_have_features_that_were_born_and_died(open_page, run):
    first, second = "sae-a/step-00000020", "sae-a/step-00000040"
    app = open_page("compare", run, sae=first, **{"with": second}, same="0.9", show="only_b")
    assert not app.exception and not app.error and not app.warning
    shown = {metric.label: metric.value for metric in app.metric}
    assert {"Died", "Born", "Split", "Merged"} <= set(shown)
    if shown["Born"] != "0":
        assert f"feature?sae={second.replace('/', '%2F')}" in table_of(app)
    app = open_page("compare", run, sae=first, **{"with": "nonsense"}, page="-1")
    assert not app.exception and len(app.warning) == 2
    assert {box.label: box.value for box in app.selectbox}["Second"] == second


def test_a_snapshot_has_pages_of_its_own(open_page, run):
    app = open_page("feature", run, sae="sae-a/step-00000040", feature=3)
    assert not app.exception and app.title[0].value == "Feature 3"
    assert app.sidebar.selectbox[0].value == "sae-a/step-00000040"
    assert all("sae=sae-a%2Fstep-00000040" in link.proto.query_string for link in app.get("page_link"))


def test_a_crosscoder_shows_its_sides(open_page, run):
    found = sides(load_features(run / "features-cross"))
    app = open_page("compare", run, sae="sae-cross", side="all")
    assert not app.exception and not app.error and len(app.get("plotly_chart")) == 2
    assert f'feature=">{found.features()[0]}<' not in table_of(app)
    assert f"feature={found.features()[0]}" in table_of(app)
    app = open_page("compare", run, sae="sae-cross", left="1", right="1")
    assert "two different sources" in app.info[0].value


def test_one_sae_says_what_to_do(open_page, hostile_run):
    app = open_page("compare", hostile_run)
    assert not app.exception and "--snapshot-every N" in app.info[0].value


def test_the_page_does_not_import_torch(run):
    code = (
        "import sys; from saelab.app import page_compare; from saelab.features import load_features\n"
        "from saelab.features.matching import match; from saelab.features.sides import sides\n"
        f"a, b, c = (load_features({str(run)!r} + '/features-' + name) for name in ('a', 'b', 'cross'))\n"
        "match(a, b), sides(c); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
