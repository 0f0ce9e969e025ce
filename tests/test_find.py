"""`steering.find` names the feature that steers and its strength, keeps what it did, and puts the score into the table."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from typing import Any

import planted_steering as planted
import pytest
from conftest import build_tokenizer

import saelab
from saelab.errors import SaelabError
from saelab.features.peak_words import is_word, word_at_peak
from saelab.steering import Plan, find, run_trials
from saelab.steering.bootstrap import difference_interval, mean_interval
from saelab.steering.candidates import DENSITY, N_STEMS, SPREAD, draw_candidates, spread
from saelab.steering.criteria import next_token_criteria, rank_correlation
from saelab.steering.fluency import distinct_ngrams, echoes, fluency, repeated_ngrams, zlib_ratio
from saelab.steering.teacher_forced import Unsteered
from saelab.steering.trial_file import TrialFile

TEXTS: dict[str, Any] = {"max_new_tokens": 50, "temperature": planted.TEMPERATURE, "seed": 3, "progress": False}
SHORT: dict[str, Any] = {"features": [0, 3], "strengths": (4.0, 0.5), "max_new_tokens": 6, "progress": False}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model and a store of which it is known what steers."""
    return planted.planted_store(tmp_path_factory.mktemp("planted") / "run", build_tokenizer())


@pytest.fixture(scope="module")
def found(case):
    lm, store = case
    return find(store, lm, planted.PROMPTS, range(planted.N_FEATURES), strengths=planted.STRENGTHS, **TEXTS)


def copied(store, folder):
    """A copy of a store in a run of its own, without annotations."""
    shutil.copytree(store.folder, folder / "features")
    return saelab.load_features(folder / "features", store.sae)


def test_the_planted_feature_is_found_at_the_strength_that_stays_fluent(found):
    best, second = found.rows[:2]
    assert best.feature == planted.STEERS and best.strength == planted.STRENGTHS[0]
    assert best.read_back > 0.15 and best.steer_score > 2 * second.steer_score
    weak, strong = (found.rows[0].at(strength) for strength in planted.STRENGTHS[1:])
    assert max(trial.read_back for trial in weak) < 0.1
    assert min(trial.read_back for trial in strong) > best.read_back and max(t.fluency for t in strong) < best.fluency


def test_features_that_promote_what_another_one_fires_on_show_no_effect(case):
    lm, store = case
    choices = [(feature, planted.STRENGTHS[0]) for feature in range(planted.N_FEATURES) if feature != planted.STEERS]
    trials = run_trials(store, lm, choices, planted.PROMPTS, max_new_tokens=50, temperature=planted.TEMPERATURE, seed=3)
    assert len(trials) == 28 and mean_interval([trial.read_back for trial in trials]).covers_zero


def test_a_trial_by_hand(case, found):
    lm, store = case
    trial, how = found.rows[0].best[1], found.settings
    assert trial.prompt == 1
    feature = store.feature(trial.feature)
    with lm.steer(feature * trial.strength):
        steered = lm.generate_ids(how.prompts[1], how.max_new_tokens, how.temperature, how.seed + 1)
    unsteered = lm.generate_ids(how.prompts[1], how.max_new_tokens, how.temperature, how.seed + 1)

    def read(text):
        x = next(iter(lm.stream_activations([text.ids], [planted.HOOK])))[planted.HOOK][0, text.n_prompt :]
        z = store.sae.encode(x.clone()).to_dense()[:, trial.feature]
        log_probs = lm.logits(text.ids[None])[0].log_softmax(-1)
        chosen = [float(log_probs[i - 1, text.ids[i]]) for i in range(text.n_prompt, len(text.ids))]
        return float((z > feature.p99 / 4).float().mean()), -sum(chosen) / len(chosen)

    shares, costs = zip(read(steered), read(unsteered), strict=True)
    assert trial.text == lm.tokenizer.decode(steered.ids[steered.n_prompt :])
    assert trial.read_back == pytest.approx(shares[0] - shares[1]) and trial.read_back > 0
    assert trial.nll_cost == pytest.approx(costs[0] - costs[1], abs=1e-4)
    assert trial.score == pytest.approx(trial.read_back * fluency(trial.nll_cost, trial.ids, trial.text))


def test_held_out_prompts_show_it_too(case):
    lm, store = case
    trials = run_trials(
        store, lm, [(0, 4.0), (3, 4.0)], [" by the mill", " morning."], max_new_tokens=40, temperature=0.7
    )
    assert [(one.feature, one.prompt) for one in trials] == [(0, 0), (3, 0), (0, 1), (3, 1)]
    assert min(trials[0].read_back, trials[2].read_back) > 0.1 > max(trials[1].read_back, trials[3].read_back)


@pytest.mark.parametrize("kept", [0, 0.3, 0.7])
def test_a_search_that_was_killed_goes_on_to_the_same_result(case, tmp_path, kept):
    """A killed process leaves a file that ends anywhere."""
    lm, store = case
    first = find(copied(store, tmp_path / "a"), lm, ["The old"], **SHORT)
    content = first.path.read_bytes()
    cut = copied(store, tmp_path / "b")
    path = tmp_path / "b" / "steering" / first.path.name
    start = content.index(b"\n") + 1
    path.parent.mkdir()
    path.write_bytes(content[: start + int(kept * (len(content) - start))])
    again = find(cut, lm, ["The old"], **SHORT)
    assert again.rows == first.rows and again.path.read_bytes() == content


def test_what_was_tried_is_not_tried_again(case, tmp_path):
    lm, store = case
    run = copied(store, tmp_path / "a")
    first = find(run, lm, ["The old"], **SHORT)
    lines = first.path.read_text().splitlines()
    told = json.loads(lines[2])
    told["results"][0][3] = "kept from the file"
    lines[2] = json.dumps(told)
    first.path.write_text("\n".join(lines) + "\n")
    again = find(run, lm, ["The old"], **SHORT)
    assert "kept from the file" in [trial.text for row in again.rows for trial in row.trials]
    changed: dict[str, Any] = SHORT | {"max_new_tokens": 5}
    other = find(run, lm, ["The old"], **changed)
    assert other.path != first.path and first.path.exists()


def test_an_altered_file_is_refused(tmp_path):
    file = TrialFile(tmp_path, {"seed": 0})
    file.add("one", [1.5])
    assert TrialFile(tmp_path, {"seed": 0}).batches == {"one": [1.5]}
    content = file.path.read_text()
    file.path.write_text(content.replace("1.5", "1.5 x"))
    with pytest.raises(SaelabError, match="line 2, is no batch"):
        TrialFile(tmp_path, {"seed": 0})
    file.path.write_text(content.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(SaelabError, match="another seed"):
        TrialFile(tmp_path, {"seed": 0})


def test_loops_are_punished():
    varied, loop = list(range(30)), [7, 8, 9, 7] * 8
    assert repeated_ngrams(varied) == 0 and repeated_ngrams(loop) == pytest.approx(1 - 4 / 29)
    assert repeated_ngrams([1, 2]) == 0 and echoes([5]) == 0 and echoes([5, 5, 6, 6]) == pytest.approx(2 / 3)
    assert distinct_ngrams([[1, 2, 3], [1, 2, 4]]) == pytest.approx(3 / 4) and distinct_ngrams([[1]]) == 1
    text = "It was early in the morning when we left for the old harbour."
    assert zlib_ratio(text) > 0.7 > 0.3 > zlib_ratio("the the " * 20) and zlib_ratio("") == 1
    assert fluency(0.7, varied, text) == 1 and fluency(1.0, varied, text) == pytest.approx(2 / 3)
    assert fluency(1.6, varied, text) == 0 == fluency(-2.0, loop, text) == fluency(0.0, varied, "the the " * 20)
    assert fluency(0.0, [1, 1, 2, 3, 4, 5, 6, 7, 8, 9], text) == pytest.approx((0.3 - 1 / 9) / 0.25)


def test_criteria_by_hand(case):
    lm, store = case
    (got,) = next_token_criteria(store, lm, [(0, 4.0)], planted.PROMPTS[:1])
    plain = lm.logits(planted.PROMPTS[0])[0, -1].softmax(-1)
    with lm.steer(store.feature(0) * 4.0):
        steered = lm.logits(planted.PROMPTS[0])[0, -1].softmax(-1)
    token = int(lm.to_ids("The")[0, -1])
    assert int(steered.argmax()) == token and store.feature(0).row["top_logit"] == token
    rank = int((plain > plain[token]).sum())
    before = float(plain[token]) * (1 - rank / len(plain))
    assert (got.output_score or 0.0) > 0.1
    assert got.output_score == pytest.approx(float(steered[token]) - before, abs=0.03)
    change = -float(steered.log().topk(10).values.mean()) + float(plain.log().topk(10).values.mean())
    assert got.confidence_change == pytest.approx(change, abs=1e-4)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 9], [10, 20, 30, 31]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, None], [3, 2, 1, 7]) == pytest.approx(-1)
    # by hand: ranks 0.5, 0.5, 2, 3 and 0, 1, 2, 3
    assert rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None and rank_correlation([1, 2], [1, 2]) is None


def test_the_result_tells_what_predicts_it(found, capsys):
    correlations = found.rank_correlations()
    assert set(correlations) >= {"density", "output_score", "confidence_change", "promoted_logit"}
    assert all(value is None or -1 <= value <= 1 for row in correlations.values() for value in row.values())
    found.show(3)
    printed = capsys.readouterr().out
    assert (
        f"{found.failed_share:.0%} failed" in printed and "output_score" not in printed
    )  # of eight features it says nothing
    many = found._replace(rows=(*found.rows, *found.rows))
    many.show(3)
    assert "output_score" in capsys.readouterr().out


def test_the_score_is_a_column_of_the_table(case, found):
    _, store = case
    rows = store.table("steer_score")
    assert rows[0]["feature"] == found.rows[0].feature
    assert [row["steer_score"] for row in rows] == [row.steer_score for row in found.rows]
    bound = {"steer_score": (found.rows[1].steer_score, None)}
    assert store.count(bound) == 2 and store.features("steer_score", False, bound)[-1] == planted.STEERS
    assert store.column("steer_score")[planted.STEERS] == found.rows[0].steer_score
    told = store.feature(planted.STEERS).scores["steer"]
    assert told["strength"] == 4.0 and told["read_back"] == found.rows[0].read_back
    assert store.search("old")[0]["steer_score"] is not None


def test_a_repeated_search_adds_no_annotation_and_an_untried_feature_has_no_score(case, tmp_path):
    lm, store = case
    run = copied(store, tmp_path / "a")
    find(run, lm, ["The old"], **SHORT)
    n_rows = run.annotations.export(tmp_path / "rows.jsonl")
    find(run, lm, ["The old"], **SHORT)
    assert run.annotations.export(tmp_path / "rows.jsonl") == n_rows == 2
    rows = run.table("steer_score", limit=100)
    assert [row["steer_score"] is None for row in rows] == [False] * 2 + [True] * 6
    assert run.count({"steer_score": (None, None)}) == 8 and run.count({"steer_score": (-1, None)}) == 2


def test_candidates_have_several_words_and_a_topic(hostile_run, monkeypatch):
    assert (DENSITY, N_STEMS, SPREAD) == ((1e-3, 1.5e-2), 5, 0.04)
    store = saelab.load_features(hostile_run / "features")
    monkeypatch.setattr("saelab.steering.candidates.DENSITY", (1e-3, 0.2))
    monkeypatch.setattr("saelab.steering.candidates.WORDS", 0.2)
    within = store.features("feature", False, {"density": (1e-3, 0.2)})
    stems = {i: [stem for stem in store.peak_stems(i) if stem] for i in within}
    words = {i: len(set(stems[i])) >= 2 and len(stems[i]) >= 0.2 * len(store.feature(i).examples()) for i in within}
    shares = {i: spread(store.feature(i).examples(), (store.feature(i).p99 or 0.0) / 4) for i in within}
    bound = sorted(shares[i] for i in within if words[i])[2]
    monkeypatch.setattr("saelab.steering.candidates.N_STEMS", 2)
    monkeypatch.setattr("saelab.steering.candidates.SPREAD", bound)
    drawn = draw_candidates(store, 99, seed=1)
    assert set(drawn) == {i for i in within if words[i] and shares[i] >= bound}
    assert 2 < len(drawn) < sum(words.values()) < len(within)
    assert draw_candidates(store, 2, seed=1) == drawn[:2]
    assert {tuple(draw_candidates(store, 99, seed=seed)) for seed in range(6)} != {tuple(drawn)}
    monkeypatch.setattr("saelab.steering.candidates.N_STEMS", 99)
    with pytest.raises(ValueError, match=r"name features=\[\.\.\.\]"):
        draw_candidates(store, 5)


def test_spread_and_words_by_hand(case):
    _, store = case
    made = replace(
        store.feature(0).examples(1)[0], pieces=(b" a", b"moon", b"light", b" -"), values=(0.0, 5.0, 2.0, 1.0), peak=1
    )
    assert spread([made], 1.5) == pytest.approx(1 / 3) and spread([made], 0.5) == pytest.approx(2 / 3)
    assert spread([replace(made, value=-5.0, values=(0.0, -5.0, -2.0, 1.0))], 1.5) == pytest.approx(1 / 3)
    assert (
        word_at_peak(made) == "amoonlight"
        and word_at_peak(replace(made, pieces=(b"a", b" moon", b"light", b" -"))) == "moonlight"
    )
    assert is_word("sea") and is_word("\u6d77") and not is_word("of") and not is_word("x_1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "names no feature"),
        ({"strengths": (0.0,)}, "numbers other than 0"),
        ({"strengths": ()}, "numbers other than 0"),
        ({"features": [99]}, "features 0 to 7"),
    ],
)
def test_bad_arguments(case, change, message):
    lm, store = case
    with pytest.raises(ValueError, match=message):
        find(store, lm, ["The"], **(SHORT | change))


def test_other_models_and_steered_ones_are_refused(case, tiny_lm):
    lm, store = case
    with pytest.raises(ValueError, match="has other weights"):
        find(store, tiny_lm, ["The"], **SHORT)
    with pytest.raises(ValueError, match="expected texts"):
        find(store, lm, [[3, 4]], **SHORT)
    with lm.steer(store.feature(0) * 1.0), pytest.raises(ValueError, match="being steered"):
        find(store, lm, ["The"], **SHORT)


def test_intervals_of_means():
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    values = [0.0, 1.0] * 50
    got = mean_interval(values)
    assert got.mean == 0.5 and got.low == pytest.approx(0.4, abs=0.03) and got.high == pytest.approx(0.6, abs=0.03)
    assert mean_interval(values) == got and not got.covers_zero and mean_interval([-1.0, 1.0]).covers_zero
    alike = [[float(row % 2)] * 5 for row in range(20)]  # five seeds of a prompt that say the same are no five prompts
    assert mean_interval(alike).high == pytest.approx(mean_interval([row[0] for row in alike]).high, abs=0.03)
    within = mean_interval([[0.0, 1.0] * 50])
    assert within.low == pytest.approx(0.4, abs=0.03) and within.high == pytest.approx(0.6, abs=0.03)
    assert difference_interval([3.0] * 4, [1.0] * 9) == (2.0, 2.0, 2.0)
    assert difference_interval(values, values).covers_zero
    for call in (lambda: mean_interval([]), lambda: difference_interval([1.0], [])):
        with pytest.raises(ValueError, match="needs"):
            call()


def test_tokens_rise_along_the_unsteered_text(case):
    lm, store = case
    text = lm.generate_ids(planted.PROMPTS[0], 6)
    tokens, edit = lm.to_ids("The")[0, -1:].tolist(), store.feature(0) * 4.0
    before = lm.logits(text.ids[None])[0, text.n_prompt - 1 : -1].log_softmax(-1)
    with lm.steer(edit):
        after = lm.logits(text.ids[None])[0, text.n_prompt - 1 : -1].log_softmax(-1)
    (got,) = Unsteered(lm, [text]).shifts(Plan((edit,)), tokens)
    (rise,) = got.rises
    assert rise == pytest.approx(float((after - before)[:, tokens].mean()), abs=1e-5) and rise > 0.5
    new = text.ids[text.n_prompt :, None]
    assert got.nll_rise == pytest.approx(float((before - after).gather(1, new).mean()), abs=1e-5) and got.nll_rise != 0
    assert got.kl == pytest.approx(float((after.exp() * (after - before)).sum(-1).mean()), abs=1e-5) and got.kl > 0
