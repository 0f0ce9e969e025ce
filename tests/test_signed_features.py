"""Features of either sign: what the store, the card, the page and an edit say for every pattern of signs.

The AbsTopK SAE here has one feature for each pattern. Its bias says which: all four fire on every token, the last on none.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pages import html_of

import saelab
from saelab.app import state, steer_edits, steered_text
from saelab.app.steer_edits import PageEdit
from saelab.app.steered_text import signed
from saelab.errors import SaelabError, StoreError
from saelab.evaluation.heldout import open_score_stream
from saelab.features import schema
from saelab.features.collecting.signed import SignedAccumulator
from saelab.features.numbers import number
from saelab.features.records import Example
from saelab.features.render import examples_html, feature_card, feature_histogram_html
from saelab.io import save_sae
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import AbsTopKConfig, AbsTopKSAE, MatchingPursuitConfig, MatchingPursuitSAE, TopKConfig, TopKSAE
from saelab.steering import FeatureEdit, FeatureHandle, effect_table

HOOK = "blocks.1.hook_resid_post"
DOCUMENTS = [f"Document {i}: the river runs past mill {i % 7} and was good." for i in range(40)]
PATTERNS = {
    "always positive": 0.0,
    "always negative": 1.0,
    "mostly negative": 0.9,
    "balanced": 0.5,
    "never fires": None,
}
INDEX = {name: i for i, name in enumerate(PATTERNS)}
OLD = Path(__file__).with_name("first_version") / "finished"


@pytest.fixture(scope="module")
def world(tiny_lm, tmp_path_factory):
    """The SAE, its store in a run, and all feature activations of the same pass, dense."""
    sae = AbsTopKSAE(AbsTopKConfig(d_sae=5, k=4, normalize="none"), 32, seed=1)
    sae.provenance = replace(sae.provenance, origin={"hook_name": HOOK, "ctx_len": 32})
    rows = torch.cat([acts[keep] for _, acts, keep in _stream(sae, tiny_lm)])
    with torch.no_grad():
        for i, share in enumerate(PATTERNS.values()):
            if share is None:
                sae.W_enc[i] = 0
                continue
            spread = rows @ sae.W_enc[i]
            ordered = spread.sort().values
            below = int(share * len(ordered))
            edge = {0: ordered[0] - 0.3, len(ordered): ordered[-1] + 0.3}.get(below)
            sae.b_enc[i] = -(ordered[below - 1 : below + 1].mean() if edge is None else edge)
    folder = tmp_path_factory.mktemp("signed")
    save_sae(sae, folder / "sae", golden_inputs=rows)
    sae = saelab.load_sae(folder / "sae")
    store = saelab.collect_features(sae, tiny_lm, DOCUMENTS, out_dir=folder / "features", ctx_len=32, progress=False)
    dense, docs = [], []
    for tokens, acts, keep in _stream(sae, tiny_lm):
        dense.append(sae.encode(acts[keep]).to_dense().detach())
        docs.append(tokens.doc[keep])
    return SimpleNamespace(sae=sae, store=store, dense=torch.cat(dense), docs=torch.cat(docs), run=folder, lm=tiny_lm)


def _stream(sae, lm):
    return open_score_stream(sae, lm, DOCUMENTS, hook_name=HOOK, ctx_len=32, batch_size=16)


def _of(world, pattern):
    """The feature, its non-zero values, and the magnitudes at each end."""
    column = world.dense[:, INDEX[pattern]].double()
    ends = {sign: (sign * column)[sign * column > 0] for sign in (1, -1)}
    return world.store.feature(INDEX[pattern]), column[column != 0], ends


def _dominant(ends):
    return 1 if len(ends[1]) >= len(ends[-1]) else -1


_TICK = r'style="left:([\d.]+)%"><span>(\w+) ([^<]+)</span>'
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
firing = pytest.mark.parametrize("pattern", [name for name, share in PATTERNS.items() if share is not None])


def test_the_patterns_are_what_they_say(world):
    below = [float((world.dense[:, i] < 0).double().mean()) for i in range(5)]
    assert below == pytest.approx([0.0, 1.0, 0.9, 0.5, 0.0], abs=0.01)
    assert (world.dense[:, :4] != 0).all() and not world.dense[:, 4].any()


@every_pattern
def test_numbers(world, pattern):
    feature, values, ends = _of(world, pattern)
    assert feature.n_fired == len(values) and feature.density == len(values) / world.store.n_tokens
    assert world.store.table("feature", False, limit=5)[INDEX[pattern]] == feature.row | {"steer_score": None}
    assert [end.sign for end in feature.ends] == sorted([s for s in ends if len(ends[s])], key=lambda s: -len(ends[s]))
    for end in feature.ends:
        own = ends[end.sign]
        assert (end.n_fired, end.max) == (len(own), float(own.max()))
        assert [end.p99, end.mean, end.std] == pytest.approx(
            [float(own.quantile(0.99)), float(own.mean()), float(own.std(correction=0))], rel=1e-5, abs=1e-6
        )
    if not len(values):
        assert feature.p99 is feature.max is feature.mean is feature.sign is None
        return
    first = feature.ends[0]
    assert (feature.p99, feature.max, feature.mean, feature.std) == (first.p99, first.max, first.mean, first.std)
    assert feature.p99 > 0 and feature.sign == _dominant(ends)


@pytest.mark.parametrize("name", ["p99", "max", "mean"])
def test_tables_are_sorted_by_magnitude(world, name):
    found = [row[name] for row in world.store.table(name)]
    assert found == [*sorted(found[:4], reverse=True), None] and all(value > 0 for value in found[:4])


@every_pattern
def test_histogram_is_of_signed_values(world, pattern):
    feature, values, _ = _of(world, pattern)
    edges, counts = feature.histogram
    assert counts.sum() == len(values) and (np.diff(edges) > 0).all() or not len(values)
    if len(values):
        assert (counts == np.histogram(values.numpy(), edges)[0]).all() and counts[0] and counts[-1]
        markup = feature_histogram_html(feature)
        heights = [
            float(height) for height in re.findall(r'data-bin="[^"]*" title="[^"]*" style="height:([\d.]+)%', markup)
        ]
        assert heights == pytest.approx([max(100 * n / counts.max(), 1) for n in counts if n], abs=0.05)
        at = {(name, value): float(left) for left, name, value in re.findall(_TICK, markup)}
        for end in feature.ends:
            lines = [at[name, number(end.sign * value)] for name, value in (("p99", end.p99), ("max", end.max))]
            assert all(0 <= line <= 100 for line in lines) and end.sign * (lines[1] - lines[0]) >= 0
        assert len(at) == 4 * len(feature.ends) and ("sl-neg" in markup) == any(end.sign < 0 for end in feature.ends)


@every_pattern
def test_examples_of_both_ends(world, pattern):
    feature, _, ends = _of(world, pattern)
    column, sign = world.dense[:, INDEX[pattern]], _dominant(ends)
    for kind, side in (("top", sign), ("bottom", -sign)):
        best = sorted((float((side * column)[world.docs == doc].max()) for doc in world.docs.unique()), reverse=True)
        examples = feature.examples(kind=kind)
        assert [side * example.value for example in examples] == [value for value in best if value > 0][:20]
        assert all(example.values[example.peak] == example.value for example in examples)
        assert len(examples) > 5 or not len(ends[side])
    with pytest.raises(ValueError, match="expected one of top, bottom"):
        feature.examples(kind="loud")


@every_pattern
def test_a_highlight_is_a_share_of_its_own_ends_maximum(world, pattern):
    feature, _, ends = _of(world, pattern)
    card = feature_card(feature)
    assert card.count("100% of maximum") >= len(feature.ends)  # the strongest of each end
    assert ("at the negative end" in card) == any(end.sign < 0 for end in feature.ends) == ("rgba(86,180,233" in card)
    assert ("The other end" in card or "Examples of the other end" in card) == (len(feature.ends) == 2)
    assert ("A signed feature" in card) == any(end.sign < 0 for end in feature.ends)
    if feature.p99:
        assert number(feature.p99) in card and number(feature.p99) in repr(feature)
    promoted = [token for token, _ in feature.dominant_logits.positive]
    effect = world.lm.logit_weights() @ world.sae.W_dec[INDEX[pattern]] * (feature.sign or 1)
    assert [value for _, value in feature.dominant_logits.positive] == pytest.approx(
        effect.topk(15).values.tolist(), abs=1e-6
    )
    assert feature.row["top_logit"] == int(effect.argmax()) and len(promoted) == 15


def test_shares_by_hand():
    example = Example(-4.0, 0, 0, 1, (1, 2, 3), (b"a", b"b", b"c"), (-4.0, 1.0, 0.0), 0)
    markup = examples_html([example], 2.0, 8.0)
    assert "rgba(86,180,233,0.25)" in markup and "rgba(230,159,0,0.25)" in markup and "-4" in markup


@firing
@pytest.mark.parametrize("unit", ["p99", "max", "mean"])
def test_strength_counts_towards_the_dominant_end(world, pattern, unit):
    feature, _, ends = _of(world, pattern)
    sign = _dominant(ends)
    size = {"p99": feature.p99, "max": feature.max, "mean": feature.mean}[unit]
    assert feature.add(2.0, unit).value == pytest.approx(2.0 * sign * size)
    assert feature.clamp(1.0, unit).value == pytest.approx(sign * size)
    for end in feature.ends:
        own = {"p99": end.p99, "max": end.max, "mean": end.mean}[unit]
        assert getattr(feature, end.name).add(2.0, unit).value == pytest.approx(2.0 * end.sign * own)
    assert (feature * 2.0).value == feature.add(2.0).value == (2.0 * feature).value
    assert feature.add(2.0, "raw").value == 2.0


@firing
def test_an_edit_raises_the_end_it_names(world, pattern):
    feature, _, ends = _of(world, pattern)
    i, ids = INDEX[pattern], world.lm.to_ids("The weather today is fine")
    x = next(iter(world.lm.stream_activations([ids], [HOOK])))[HOOK]
    positions = torch.arange(x.shape[1])[None]
    row = world.sae.W_dec[i].detach()

    def pushed(edit):
        return ((edit.apply(x, positions) - x)[0, 1:] @ row).numpy()

    assert (np.sign(pushed(feature * 2.0)) == _dominant(ends)).all()
    for end in feature.ends:
        assert (np.sign(pushed(getattr(feature, end.name) * 2.0)) == end.sign).all()
    z = world.sae.encode(x[0, 1:]).column(i).detach().numpy()
    np.testing.assert_allclose(pushed(feature.ablate()), -z, atol=1e-5)
    for end in feature.ends:
        np.testing.assert_allclose(pushed(end.ablate()), np.where(z * end.sign > 0, -z, 0), atol=1e-5)
        there = np.where(z * end.sign > 0, end.sign * end.p99 - z, 0)
        np.testing.assert_allclose(pushed(end.clamp(1.0, where="fires")), there, atol=1e-5)


@pytest.mark.parametrize(
    "pattern, end", [("always positive", "negative"), ("always negative", "positive"), ("never fires", "negative")]
)
def test_an_end_that_never_fired_is_an_error_that_names_it(world, pattern, end):
    feature, _, _ = _of(world, pattern)
    with pytest.raises(SaelabError, match=f"Feature {INDEX[pattern]} never fired at its {end} end"):
        _ = getattr(feature, end) * 2.0
    assert feature.examples(kind="bottom") == []


@pytest.fixture
def page_of(world, open_page):
    """Opens a page of that run, which shows no error; and all its HTML."""

    def page_of(name, **query):
        app = open_page(name, world.run, **query)
        assert not app.exception and not app.error
        return app, html_of(app)

    return page_of


def test_the_table_marks_features_that_are_mostly_negative(world, page_of):
    _, html = page_of("features")
    below = sum(world.store.feature(i).sign == -1 for i in range(5))
    assert below >= 2 and html.count('title="mostly negative"') == 2 * below  # at p99 and at the maximum


@pytest.mark.parametrize("page", ["feature", "steer"])
@every_pattern
def test_pages_show_both_ends(world, pattern, page, page_of):
    app, html = page_of(page, feature=INDEX[pattern])
    feature, _, ends = _of(world, pattern)
    text = " ".join(str(element.value) for element in [*app.subheader, *app.info, *app.caption])
    assert html.count("Bottom examples") == (len(feature.ends) == 2)
    if page == "feature":
        shown = {metric.label: metric.value for metric in app.metric}
        assert (shown["p99"], shown["Max"]) == (number(feature.p99), number(feature.max))
        assert ("A signed feature" in text) == any(end.sign < 0 for end in feature.ends)
    elif feature.p99:
        assert f"2 \u00d7 p99 = {signed(2 * feature.sign * feature.p99)}; the feature's own" in text
        assert f"{'maximum' if feature.sign == 1 else 'minimum'} is {signed(feature.sign * feature.max)}" in text


@pytest.mark.parametrize("end, sign", [("", -1), ("negative", -1), ("positive", 1)])
def test_the_steer_page_steers_the_chosen_end(world, end, sign, monkeypatch):
    monkeypatch.setattr(state, "load_model", lambda _: world.lm)
    feature, _, _ = _of(world, "mostly negative")
    request = {"edits": (PageEdit(feature.feature, "add", 2.0, end),), "prompt": "The river", "plan": "", "on": "both"}
    request |= {"max_new_tokens": 1, "temperature": 0.0, "seed": 0, "n_seeds": 1, "strengths": (), "control": False}
    (edit,) = steered_text.plan_of(world.store, request).edits
    assert edit.value == pytest.approx(2.0 * sign * (feature.p99 if sign < 0 else feature.positive.p99))
    result = steered_text.generate(world.store, request | {"chat": False, "turns": ()})
    with world.lm.steer(edit):
        assert result["steered"] == world.lm.generate("The river", 1)


@pytest.mark.parametrize("end, sign", [("dominant", -1), ("negative", -1), ("positive", 1)])
def test_the_command_line_steers_the_chosen_end(world, end, sign, monkeypatch, capsys):
    from saelab.cli import steer_command

    real, steered = type(world.lm).generate_arms, []
    monkeypatch.setattr(steer_command, "load_lm", lambda *_: world.lm)

    def generate_arms(lm, prompt, arms, **options):
        steered.extend(edit for arm in arms if arm is not None for edit in arm.edits)
        return real(lm, prompt, arms, **options)

    monkeypatch.setattr(type(world.lm), "generate_arms", generate_arms)
    edits = steer_command.Edits(feature=((INDEX["mostly negative"],),), end=end)
    steer_command.steer(world.run, edits, steer_command.Writing(prompt="The river", max_new_tokens=1))
    assert np.sign(steered[0].value) == sign
    assert ("(positive end)" in capsys.readouterr().out) == (end == "positive")


def test_effect_table_counts_what_the_dominant_end_promotes(world):
    (row,) = effect_table(world.lm, [_of(world, "always negative")[0]], n_random=1, show=False).rows
    effect = -(world.lm.logit_weights() @ world.sae.W_dec[INDEX["always negative"]])
    assert row.promoted[0] == world.lm.tokenizer.decode([int(effect.argmax())])


def test_ties_in_firings_go_to_the_greater_sum():
    state = SignedAccumulator(3, 10, 2)
    codes = torch.tensor([[1.0, 3.0, 1.0], [-2.0, -1.0, -1.0]])
    state.update(SparseActs.from_dense(codes), torch.arange(2), torch.arange(2))
    assert state.sign.tolist() == [-1, 1, 1] and state.n_fired.tolist() == [2, 2, 2]


def test_a_window_shows_both_signs_and_ends_may_begin_late():
    state, alone = SignedAccumulator(1, 10, 3), SignedAccumulator(1, 10, 3)
    first, second = torch.tensor([[2.0], [1.0]]), torch.tensor([[3.0], [-5.0]])
    for one in (state, alone):
        one.update(SparseActs.from_dense(first), torch.arange(2), torch.zeros(2, dtype=torch.int64))
    assert state.negative is None
    assert torch.equal(windows(state.positive), windows(alone.positive))
    state.update(SparseActs.from_dense(second), torch.arange(2, 4), torch.ones(2, dtype=torch.int64))
    assert state.negative is not None and state.negative.kept["examples"].examples.value.tolist() == [5.0]
    middle = schema.WINDOW_LEFT
    assert windows(state.negative)[0, middle - 1 : middle + 1].tolist() == [3.0, -5.0]
    assert windows(state.positive)[0, middle : middle + 2].tolist() == [3.0, -5.0]


def windows(end):
    return end.kept["examples"].examples.windows.dense()


def test_a_store_without_negative_values_has_one_end(tiny_lm, tmp_path):
    sae = TopKSAE(TopKConfig(d_sae=16, k=2, normalize="none"), 32)
    store = saelab.collect_features(
        sae, tiny_lm, DOCUMENTS, out_dir=tmp_path / "f", hook_name=HOOK, ctx_len=32, n_tokens=200, progress=False
    )
    assert store.signed is False and store.manifest["signed"] is False
    assert store._query("SELECT count(*) FROM sqlite_master WHERE name = 'feature_end'") == [(0,)]
    assert {row["sign"] for row in store.table(limit=16)} <= {1, None}


def test_signed_matching_pursuit_has_two_ends_too(tiny_lm, tmp_path):
    sae = MatchingPursuitSAE(MatchingPursuitConfig(d_sae=24, k=4, signed=True, normalize="none"), 32)
    store = saelab.collect_features(
        sae, tiny_lm, DOCUMENTS, out_dir=tmp_path / "f", hook_name=HOOK, ctx_len=32, n_tokens=300, progress=False
    )
    firing = [store.feature(row["feature"]) for row in store.table(where={"n_fired": (1, None)})]
    assert store.signed and {feature.sign for feature in firing} == {1, -1}
    assert all((feature.p99 or 0) > 0 and np.sign((feature * 2.0).value) == feature.sign for feature in firing)


# --- stores of the first version


def test_an_old_store_of_signed_features_opens_and_refuses_its_units():
    store = saelab.load_features(OLD / "abs_topk" / "features")
    feature = store.feature(store.table(limit=1)[0]["feature"])
    assert store.signed is None and feature.examples() and feature.histogram.counts.sum() == feature.n_fired
    assert "mixed the two ends" in feature_card(feature) and "mixed the two ends" in repr(feature)
    for call in (
        lambda: feature * 2.0,
        lambda: feature.clamp(1.0, "max"),
        lambda: feature.positive,
        lambda: feature.negative,
        lambda: feature.examples(kind="bottom"),
    ):
        with pytest.raises(SaelabError, match="Remove its folder and collect it again"):
            call()
    assert feature.add(1.0, "raw").value == 1.0 and feature.ablate().value == 0.0 and feature.scale(2.0).value == 2.0
    with pytest.raises(ValueError, match="mixed the two ends"):
        steer_edits.check(store, [PageEdit(feature.feature, "add", 1.0)])


@pytest.mark.parametrize(
    "variant, config, signed",
    [
        ("topk", None, False),
        ("abs_topk", None, None),
        ("matching_pursuit", {"signed": True}, None),
        ("matching_pursuit", {"signed": False}, False),
        ("matching_pursuit", None, None),
    ],
)
def test_which_old_stores_are_trusted(world, tmp_path, variant, config, signed):
    shutil.copytree(OLD / "abs_topk" / "features", tmp_path / "features")
    path = tmp_path / "features" / schema.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["sae"] |= {"variant": variant, "folder": "../sae"}
    path.write_text(json.dumps(manifest))
    if config is not None:
        (tmp_path / "sae").mkdir()
        (tmp_path / "sae" / "sae.json").write_text(json.dumps({"config": config}))
    assert saelab.load_features(tmp_path / "features").signed is signed


def test_handles_of_an_end_count_raw_strength_towards_it(world):
    handle = FeatureHandle(world.sae, 2, HOOK, units={"p99": 3.0}, end=-1)
    raw = handle.add(2.0, "raw")
    assert isinstance(raw, FeatureEdit) and raw.value == -2.0 and (handle * 2.0).value == -6.0
    with pytest.raises(StoreError, match="no steering unit"):
        _ = saelab.load_features(OLD / "abs_topk" / "features").feature(0).positive
