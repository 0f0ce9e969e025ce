"""Interactions of a poly SAE's features: in the store, on the Feature page, and against firing together."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from pages import html_of
from tiny_runs import HOOK, make_run
from tiny_saes import build

import saelab
from saelab.app import state
from saelab.benchmarks.interactions import interactions_picture
from saelab.evaluation.interactions import pair_table, pearson
from saelab.features import load_features
from saelab.features.interactions import sampled_feature_acts
from saelab.features.token_text import token_bytes
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.interactions import pair_directions, pair_norms


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm) -> Path:
    """A RUN whose SAE is a poly that was trained for a few steps."""
    folder = make_run(tmp_path_factory.mktemp("poly") / "run", tiny_lm)
    config = saelab.saes.PolyConfig(48, 6, rank_pairs=8, mode="separate")
    steps = saelab.TrainConfig(n_tokens=4_000, batch_size=200, warmup_steps=2, checkpoint_every=0, device="cpu")
    sae: Any = saelab.train(config, folder / "cache", steps, folder / "sae", progress=False)
    saelab.collect_features(sae, tiny_lm, out_dir=folder / "features", progress=False)
    return folder


@pytest.fixture(scope="module")
def store(run):
    return load_features(run)


def busiest(store: Any) -> int:
    return int(store.column("density").argmax())


def test_the_largest_products_with_what_they_are(store, tiny_lm):
    this = busiest(store)
    found = store.feature(this).interactions(6, min_both=0)
    directions, rows = pair_directions(store.sae, this).float(), store.sae.decoder()[0].detach().float()
    fired, p99 = store.column("n_fired") > 0, store.column("p99")
    sizes = directions.norm(dim=1).numpy() * np.abs(p99)
    order = [i for i in np.argsort(-sizes).tolist() if fired[i] and i != this]
    assert [one["feature"] for one in found] == order[:6]
    assert [one["feature"] for one in store.interactions(this, len(order), min_both=0)] == order
    both = store.firing_together(this)[0]
    for least in (10, 30):  # of those that fire together often enough to be believed
        kept = [i for i in order if both[i] >= least]
        assert [one["feature"] for one in store.interactions(this, 48, min_both=least)] == kept and len(kept) < len(
            order
        )
    assert store.interactions(this, 48) == store.interactions(this, 48, min_both=10)
    together = {one["feature"]: one for one in store.coactivation(this, 47)}
    unit = torch.nn.functional.normalize
    for one in found:
        other = one["feature"]
        direction = directions[other]
        assert one["norm"] == pytest.approx(float(direction.norm()), rel=1e-5)
        assert one["at_p99"] == pytest.approx(one["norm"] * abs(p99[this] * p99[other]), rel=1e-5)
        for name, row in (("cosine", this), ("cosine_other", other)):
            assert one[name] == pytest.approx(float(unit(direction, dim=0) @ unit(rows[row], dim=0)), abs=1e-5)
        counted = together.get(other, {"n_both": 0, "lift": 0.0, "p_given_this": 0.0})
        assert [one[name] for name in ("n_both", "lift", "p_given_this")] == pytest.approx(
            [counted[name] for name in ("n_both", "lift", "p_given_this")]
        )
    (named,) = store.interactions(this, 1, tiny_lm, min_both=0)
    ids = (directions[named["feature"]] @ tiny_lm.logit_weights().float().T).topk(5).indices
    spelled = token_bytes(tiny_lm.tokenizer, ids.tolist())
    assert named["promoted"] == [spelled[one].decode("utf-8", "backslashreplace") for one in ids.tolist()]
    assert {key: named[key] for key in found[0]} == found[0]


def test_a_feature_that_never_fired_takes_no_place(store, monkeypatch):
    this, column = busiest(store), store.column
    strongest, *others = (one["feature"] for one in store.interactions(this, 6))
    n_fired = column("n_fired").copy()
    n_fired[strongest] = 0
    monkeypatch.setattr(store, "column", lambda name: n_fired if name == "n_fired" else column(name))
    assert [one["feature"] for one in store.interactions(this, 5)] == others


def test_what_has_no_interactions_is_refused(store, hostile_run):
    linear = load_features(hostile_run)
    assert linear.additive and not store.additive
    with pytest.raises(ValueError, match="topk has no products of features: interactions need a poly SAE"):
        linear.interactions(0)
    with pytest.raises(ValueError, match="k=0"):
        store.interactions(0, 0)
    with pytest.raises(ValueError, match="feature=48"):
        store.interactions(48)


def test_the_feature_page_shows_them_and_names_their_tokens(run, store, tiny_lm, open_page, hostile_run, monkeypatch):
    this = busiest(store)
    app = open_page("feature", run, feature=this)
    assert not app.exception and not app.error
    assert "Interacts with" in [one.value for one in app.subheader]
    shown = html_of(app)
    found = store.interactions(this, 8, tiny_lm)
    for one in found:
        assert f">{one['feature']}</a>" in shown and f"{one['cosine']:+.2f}, {one['cosine_other']:+.2f}" in shown
    assert "<th>Promote together</th>" not in shown
    monkeypatch.setattr(state, "load_model", lambda name: tiny_lm)
    app.button(key="name-interactions").click().run()
    assert not app.exception and "<th>Promote together</th>" in html_of(app)
    other = store.features("density")[1]
    app.query_params["feature"] = str(other)
    assert "<th>Promote together</th>" not in html_of(app.run())
    app = open_page("feature", hostile_run, feature=0)
    assert "Interacts with" not in [one.value for one in app.subheader]


def test_pairs_against_firing_together(store):
    acts = sampled_feature_acts(store)
    dense = acts.to_dense()
    assert torch.equal(dense.sum(0).long(), torch.from_numpy(np.diff(store.sample["feature_offsets"])).long())
    table = pair_table(store.sae, acts, 10)
    kept = sorted(dense.sum(0).argsort(descending=True, stable=True)[:10].tolist())
    want = [[i, j] for i in kept for j in kept if i < j]
    assert table.pairs.tolist() == want
    for (i, j), norm, together in zip(want[::7], table.norms[::7].tolist(), table.together[::7].tolist(), strict=True):
        assert norm == pytest.approx(float(pair_directions(store.sae, i)[j].norm()), rel=1e-4)
        assert together == pytest.approx(float((dense[:, i] * dense[:, j]).mean()))
    x, y = table.norms.double().numpy(), table.together.double().numpy()
    assert table.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert np.isnan(pearson(table.norms, torch.ones(len(want))))
    drawn = ElementTree.fromstring(interactions_picture(table, 20))
    dots = [one for one in drawn.iter() if one.tag.endswith("circle")]
    assert len(dots) == min(20, int((table.together > 0).sum()))
    assert "share of tokens on which both fire" in [one.text for one in drawn.iter()]


def test_features_that_never_fire_are_in_no_pair():
    sae = build("poly")
    acts = SparseActs.from_dense(torch.tensor([[0.0, 1.0, 2.0] + [0.0] * 37, [0.0, 0.0, 3.0] + [0.0] * 37]))
    table = pair_table(sae, acts)
    assert table.pairs.tolist() == [[1, 2]] and table.together.tolist() == [0.5]
    torch.testing.assert_close(table.norms, pair_norms(sae, [1, 2])[0, 1:])


def test_zeroing_a_feature_keeps_what_it_does_not_take_part_in(store, tiny_lm):
    """The measured effect is of the edit that decodes twice."""
    feature = store.feature(busiest(store))
    effect = feature.effect(tiny_lm, 2)
    assert effect.control == 0 and effect.kl.mean > 0
    example = feature.examples(1)[0]
    ids = torch.tensor(example.token_ids)[None]
    x = next(iter(tiny_lm.stream_activations([ids], [HOOK])))[HOOK][0].clone()
    sae = store.sae
    z = sae.encode(x)
    without = z.where(z.features != feature.feature)
    with tiny_lm.steer(feature.ablate()):
        steered = next(iter(tiny_lm.stream_activations([ids], [HOOK])))[HOOK][0]
    free = ~torch.isin(ids[0], torch.tensor(tiny_lm.special_ids))
    free[0] = False
    want = x + torch.where(free[:, None], sae.decode(without) - sae.decode(z), 0.0)
    torch.testing.assert_close(steered, want.detach(), atol=1e-4, rtol=1e-4)
