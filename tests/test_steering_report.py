"""`steering_report`: the planted feature is measured beside controls that push as hard and show nothing."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import planted_steering as planted
import pytest
import torch
from conftest import build_tokenizer
from rich.console import Console

import saelab
from saelab.cli.main import main
from saelab.edits.feature_handle import FeatureHandle
from saelab.errors import SaelabError
from saelab.saes import ReLUConfig, ReLUSAE
from saelab.steering import Plan, SteeringReport, steering_report
from saelab.steering.bootstrap import Estimate
from saelab.steering.compare import _arms
from saelab.steering.control import TurnedEdit, along
from saelab.steering.effect_plot import Point, effect_plot
from saelab.steering.report_ways import ASKED, DIFF_MEANS, FEATURE, RANDOM_DIRECTION, RANDOM_FEATURE
from saelab.steering.reported import ReportRow

HOW: dict[str, Any] = {
    "strengths": planted.STRENGTHS, "seeds": (3, 4, 5), "max_new_tokens": 40, "temperature": planted.TEMPERATURE,
    "progress": False,
}  # fmt: skip
SHORT: dict[str, Any] = {"strengths": (1.0, 4.0), "seeds": (0,), "max_new_tokens": 4, "progress": False}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return planted.planted_store(tmp_path_factory.mktemp("planted") / "run", build_tokenizer())


@pytest.fixture(scope="module")
def report(case):
    lm, store = case
    return steering_report(lm, store.feature(planted.STEERS), planted.PROMPTS, **HOW)


def test_the_planted_feature_steers_at_the_planted_strength(report):
    assert report.best.strength == planted.STRENGTHS[0]
    assert report.best.way == FEATURE and report.best.read_back.low > 0.1 and report.best.score.low > 0
    assert [row.strength for row in report.of(FEATURE)] == sorted(planted.STRENGTHS)
    weak, best, strong = report.of(FEATURE)
    assert weak.read_back.mean < 0.1 and strong.read_back.mean > best.read_back.mean
    assert strong.score.mean < best.score.mean and best.nll_cost.mean < strong.nll_cost.mean
    assert weak.peak_rise.mean < best.peak_rise.mean and 0 < weak.kl.mean < best.kl.mean < strong.kl.mean
    assert 0 < best.neutral_cost.mean < strong.neutral_cost.mean and strong.distinct < best.distinct < 1
    assert "Best at 4 p99" in report.verdict() and "Better" not in report.verdict()


def test_random_controls_show_no_effect(report):
    for way in (RANDOM_DIRECTION, RANDOM_FEATURE):
        row = report.of(way)[1]
        assert row.strength == planted.STRENGTHS[0] and (row.read_back.covers_zero or row.read_back.high < 0), way
        assert row.score.high < report.best.score.low
    assert report.of(RANDOM_DIRECTION)[1].read_back.covers_zero
    areas = {way: report.area(way, most_nats=1.5) for way in report.ways}
    assert all(areas[FEATURE] > 5 * areas[way] for way in report.ways if way != FEATURE)


def test_a_feature_that_promotes_another_ones_token_does_not_steer(case):
    lm, store = case
    found = steering_report(lm, store.feature(3), planted.PROMPTS, **HOW | {"strengths": (4.0,), "seeds": (3, 4)})
    assert found.best is None and "does not steer" in found.verdict() and found.data()["best_strength"] is None
    promoted, peaks = found.rows[0].promoted_rise, found.rows[0].peak_rise
    assert promoted is not None and peaks is not None and promoted.mean > 1 > peaks.mean


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_controls_push_exactly_as_hard(case, normalize):
    lm, _ = case
    sae = ReLUSAE(ReLUConfig(8, normalize=normalize), d_in=planted.D)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(8, planted.D, generator=torch.Generator().manual_seed(0)))
    sae.provenance = replace(sae.provenance, origin={"hook_name": planted.HOOK})
    edit = FeatureHandle(sae.requires_grad_(False), 2).add(-3.0, unit="raw")
    turned = along(edit, torch.randn(planted.D, generator=torch.Generator().manual_seed(1)))
    assert isinstance(turned, TurnedEdit) == (normalize == "layer_norm")
    x, positions = torch.randn(1, 5, planted.D), torch.arange(5)[None]
    changes = [(one.apply(x, positions) - x)[0, 1:] for one in (edit, turned)]
    assert torch.allclose(changes[0].norm(dim=1), changes[1].norm(dim=1), rtol=1e-4)
    assert not torch.allclose(changes[0], changes[1], atol=0.1) and changes[0].norm() > 1
    plans = [arm.plan for arm in _arms(Plan((edit,)), [1.0, 4.0], control=True) if arm.control and arm.plan]
    weak, strong = ((plan.edits[0].apply(x, positions) - x)[0, 1:] for plan in plans)
    assert torch.allclose(4 * weak, strong, atol=1e-4)


def test_every_prompt_has_its_own_controls(case, monkeypatch):
    lm, store = case
    plans: list[tuple[Any, ...]] = []
    made = type(lm).generate_arms
    monkeypatch.setattr(
        type(lm), "generate_arms", lambda self, p, arms, **how: plans.append(arms) or made(self, p, arms, **how)
    )
    steering_report(lm, store.feature(0), planted.PROMPTS[:3], **SHORT)
    of_way = [plans[3 + 3 * i : 6 + 3 * i] for i in range(3)]
    feature, direction, other = ([arms[1].edits[0] for arms in way] for way in of_way)
    assert len({edit.value for edit in feature}) == 1 and all(
        isinstance(plan, Plan) for arms in plans[3:12] for plan in arms
    )
    for control in (direction, other):
        vectors = torch.stack([edit.vector for edit in control])
        assert (
            torch.allclose(vectors.norm(dim=1), vectors[0].norm()) and float(torch.cdist(vectors, vectors)[0, 1]) > 0.1
        )


def test_labelled_texts_make_the_difference_and_the_probe(case):
    lm, store = case
    about = [f"The river runs past the light {i}" for i in range(9)]
    other = [f"quietly of the morning by the mill {i}" for i in range(9)]
    found = steering_report(
        lm, store.feature(0), ["The old"], positive=about, negative=other, neutral=other[:2], **SHORT
    )
    assert found.probe is not None and found.probe.accuracy > 0.5
    assert found.rows[0].probe is not None and found.n_neutral == 2
    assert "concept" in str(found._repr_html_()) and found.of(DIFF_MEANS)
    few = steering_report(lm, store.feature(0), ["The old"], positive=about[:3], negative=other[:3], **SHORT)
    assert few.probe is None and few.rows[0].probe is None and few.of(DIFF_MEANS)


def test_the_prompt_that_asks(case):
    lm, store = case
    found = steering_report(lm, store.feature(0), ["the light of"], **SHORT)
    assert found.ask.startswith("The following text is about ") and len(found.of(ASKED)) == 1
    assert found.of(ASKED)[0].kl is None and found.of(ASKED)[0].strength is None
    said = steering_report(lm, store.feature(0), ["the light of"], ask="The old mill. ", **SHORT)
    text = lm.generate("The old mill. the light of", 4, 0.8, 0)
    assert said.ask == "The old mill. " and said.of(ASKED)[0].example == text.removeprefix("The old mill. the light of")
    assert not steering_report(lm, store.feature(0), ["the light of"], ask="", **SHORT).of(ASKED)


def test_what_was_asked_for_is_read_behind_the_plain_prompt(tiny_lm, hostile_run):
    store = saelab.load_features(hostile_run)
    feature = store.feature(store.table("density", limit=1)[0]["feature"])
    said = steering_report(tiny_lm, feature, ["the light of"], ask="The old mill. ", **SHORT)
    plain = tiny_lm.to_ids("the light of")[0]
    nll = []
    for before in ("The old mill. ", ""):
        made = tiny_lm.generate_ids(f"{before}the light of", 4, 0.8, 0)
        new = made.ids[made.n_prompt :]
        logits = tiny_lm.logits(torch.cat([plain, new])[None])[0, len(plain) - 1 : -1]
        nll.append(float(-logits.log_softmax(-1).gather(1, new[:, None]).mean()))
    assert said.of(ASKED)[0].nll_cost.mean == pytest.approx(nll[0] - nll[1], abs=1e-5) and nll[0] != nll[1]


def test_the_card_escapes_and_stands_alone(report, tmp_path):
    hostile = "</dd><script>alert(1)</script>\u202e"
    rows = tuple(row._replace(example=hostile) for row in report.rows)
    altered = replace(
        report, rows=rows, label=hostile, prompts=(hostile,), unsteered=hostile, ask=hostile, model=hostile
    )
    text = altered.save(tmp_path / "card.html").read_text(encoding="utf-8")
    assert (
        "<script" not in text
        and "\u202e" not in text
        and text.count("<svg") == 1
        and "http" not in text.replace("http-equiv", "")
    )
    assert len(text.encode()) < 100_000 and "default-src 'none'" in text
    assert json.loads(json.dumps(report.data(), allow_nan=False))["best_strength"] == 4.0
    altered.show()


@pytest.mark.parametrize("width", [80, 120, 300])
def test_the_table_fits_the_terminal(report, width):
    printed = io.StringIO()
    report.show(Console(width=width, file=printed))
    text = printed.getvalue()
    best = report.best
    told = [
        f"{one.mean:+.2f} [{one.low:+.2f}, {one.high:+.2f}]".replace("-", "\u2212")
        for one in (best.read_back, best.nll_cost)
    ]
    assert all(one in text for one in told) and "\u2026" not in text and max(map(len, text.splitlines())) <= width
    assert ("A wider terminal" in text) == (width < 300)


def row(strength: float, effect: float, cost: float, score: float | None = None) -> ReportRow:
    def sure(value: float) -> Estimate:
        return Estimate(value, value, value)

    scored = sure(effect if score is None else score)
    return ReportRow(FEATURE, strength, sure(effect), None, None, None, sure(cost), None, None, 0.0, 1.0, scored, "")


def reported(*rows: ReportRow) -> SteeringReport:
    return SteeringReport(0, "", "tiny", ("a",), (0,), 0, "", rows, "", None)


def test_elbow_and_area_of_known_curves():
    found = reported(row(1, 0.2, 0.1), row(2, 0.4, 0.2), row(3, 0.5, 1.0), row(4, 0.9, 3.0, 0.0))
    assert (found.elbow, found.best) == (found.rows[1], found.rows[2])
    assert found.area() == pytest.approx(0.1 * 0 + 0.1 * 0.2 + 0.8 * 0.4)
    assert found.area(most_nats=2.0) == pytest.approx((0.1 * 0.2 + 0.8 * 0.4 + 1.0 * 0.5) / 2)
    assert reported(row(1, -0.1, 0.1)).elbow is None and reported(row(1, 0.0, 0.1)).area() == 0
    free = reported(row(1, 0.3, -0.2))
    assert free.elbow is free.rows[0] and free.area() == pytest.approx(0.3)


def test_the_plot_holds_every_point_within_its_frame():
    text = effect_plot(
        {"<a>": [Point(-0.5, 0.1, -0.2, 0.3, "1"), Point(2.0, 0.9, 0.8, 1.0)], "b": [Point(0, 0, 0, 0)]}, "x", "y"
    )
    assert text.count('<g transform="translate') == 3 + 2 and "&lt;a&gt;" in text and "<a>" not in text
    with pytest.raises(ValueError, match="nothing to plot"):
        effect_plot({"a": []}, "x", "y")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strengths": (0.0,)}, "positive numbers"),
        ({"strengths": (1.0, 1.0)}, "each once"),
        ({"strengths": (float("nan"),)}, "positive numbers"),
        ({"seeds": ()}, "each once"),
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": (-1,)}, "seeds"),
        ({"positive": ["a b c"]}, "both sides"),
        ({"prompts": []}, "expected texts"),
        ({"prompts": [""]}, "expected texts"),
        ({"feature": 17}, "no feature of a store"),
    ],
)
def test_bad_input_is_refused(case, change, said):
    lm, store = case
    given = {"feature": store.feature(0), "prompts": ["The old"], **SHORT} | change
    with pytest.raises(ValueError, match=said):
        steering_report(lm, **given)


def test_a_steered_model_and_another_model_are_refused(case, tiny_lm):
    lm, store = case
    with lm.steer(store.feature(0) * 1.0), pytest.raises(ValueError, match="being steered"):
        steering_report(lm, store.feature(0), **SHORT)
    with pytest.raises(ValueError, match="other weights"):
        steering_report(tiny_lm, store.feature(0), **SHORT)


@pytest.mark.usefixtures("models_load_in_fp32")
def test_the_command_writes_the_card(hostile_run, capfd, tmp_path):
    store = saelab.load_features(hostile_run)
    busiest = store.table("density", limit=1)[0]["feature"]
    words = ["steer", str(hostile_run), "--feature", str(busiest), "--report", str(tmp_path / "card.html")]
    few = ["--prompt", "the river", "--max-new-tokens", "3", "--strengths", "1", "--seeds", "2"]
    assert main([*words, *few, "--json"]) == 0, capfd.readouterr().err
    told = json.loads(capfd.readouterr().out)
    assert told["feature"] == busiest and told["seeds"] == [2] and told["prompts"] == ["the river"]
    assert [one["strength"] for one in told["rows"] if one["way"] == FEATURE] == [1.0]
    assert main([*words, *few]) == 0 and "random direction" in capfd.readouterr().out
    assert "<svg" in (tmp_path / "card.html").read_text(encoding="utf-8")
    for more, said in ((["--control"], "no use for --control"), (["--feature", "1"], "one feature, got 2")):
        assert main([*words, *few, *more]) == 2 and said in capfd.readouterr().err


def test_a_feature_that_never_fired_is_refused_and_no_control(tmp_path):
    lm, _, directions = planted.planted_model(build_tokenizer())
    sae = planted.planted_sae(directions)
    with torch.no_grad():
        sae.b_enc[1:] = -1e3
    store = saelab.collect_features(sae, lm, [planted.TEXT * 3], out_dir=tmp_path / "run", ctx_len=64, progress=False)
    with pytest.raises(SaelabError, match="p99"):
        steering_report(lm, store.feature(2), **SHORT)
    assert RANDOM_FEATURE not in steering_report(lm, store.feature(0), ["The old"], **SHORT).ways
