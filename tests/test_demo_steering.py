"""The demo steers with what can be read: the strongest effect among the fluent texts."""

import saelab
from saelab.cli import demo_steering
from saelab.cli.demo_steering import Trial, choose_steering


def test_candidates_are_tried_in_the_order_of_what_their_p99_adds_to_a_logit(hostile_run, tiny_lm, monkeypatch):
    store = saelab.load_features(hostile_run / "features")
    monkeypatch.setattr(demo_steering, "_EVERYDAY", 0)
    monkeypatch.setattr(demo_steering.re, "fullmatch", lambda *_: True)
    monkeypatch.setattr(demo_steering, "_CANDIDATES", store.d_sae)
    found = demo_steering._candidates(tiny_lm, store)
    pushes = [(feature.p99 or 0.0) * feature.dominant_logits.positive[0][1] for feature in found]
    assert len(found) > 2 and pushes == sorted(pushes, reverse=True)


def test_a_fluent_text_wins_over_a_stronger_effect(hostile_run, tiny_lm, monkeypatch):
    store = saelab.load_features(hostile_run / "features")
    feature = store.feature(store.table(sort="n_fired", limit=1)[0]["feature"])
    real = demo_steering._try(tiny_lm, feature, 1.0, "The weather", 8)
    assert real.log_prob < 0 and 0 < real.distinct <= 1
    own = tiny_lm.generate_ids("The weather", 8)
    fluent = demo_steering._mean_log_prob(tiny_lm, own.ids, own.n_prompt)
    trials = {
        1.0: Trial(feature, 1.0, 1.0, fluent - 0.5, 1.0),
        1.5: Trial(feature, 1.5, 9.0, fluent - 3.0, 1.0),
        2.0: Trial(feature, 2.0, 8.0, fluent, 0.3),
    }
    monkeypatch.setattr(demo_steering, "STRENGTHS", tuple(trials))
    monkeypatch.setattr(demo_steering, "_try", lambda lm, feature, strength, *_: trials[strength])
    chosen = choose_steering(tiny_lm, store, "The weather", 8)
    assert chosen is not None and chosen.strength == 1.0
