"""A probing run from end to end on a planted SAE; what its report says, by hand; resuming; the command."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import planted_steering as planted
import pytest
import torch
from conftest import build_tokenizer

from saelab.cli.probe_command import ProbeFlags
from saelab.errors import SaelabError
from saelab.files import locked
from saelab.probing import LabelledSet, ProbeConfig, ProbeReport, probe_sets, running
from saelab.probing.fitting import Outcome
from saelab.probing.methods import methods
from saelab.probing.quiver import quiver
from saelab.probing.report import Arrow, Draw, ProbedSet, redraw_noise, title
from saelab.probing.report_shown import conclusions, report_html, save, told

CONFIG = ProbeConfig(ks=(1, 2), n_train=64, n_test=64, n_splits=2, few=(8,), imbalance=(), noise=(0.1,), n_hard_sets=1)
HOSTILE = "<img src=x onerror=alert(1)>\u202e"


@pytest.fixture(scope="module")
def case():
    """A model whose last token decides the label, and an SAE with a feature for that token."""
    lm, tokens, directions = planted.planted_model(build_tokenizer())
    written = [lm.tokenizer.decode([one]) for one in tokens]
    ends = [
        text
        for text in written[:6]
        if lm.tokenizer(text, add_special_tokens=False)["input_ids"] == [tokens[written.index(text)]]
    ]
    generator = np.random.default_rng(0)
    texts = list(dict.fromkeys("".join(generator.choice(written, 9)) + ends[i % len(ends)] for i in range(400)))
    last = [lm.tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in texts]
    yes = np.array([one == last[0] for one in last])
    kept = sorted([*np.flatnonzero(yes)[:60], *np.flatnonzero(~yes)[:60]])
    own = LabelledSet("planted", HOSTILE, HOSTILE, tuple(texts[i] for i in kept), yes[kept])
    chance = LabelledSet("chance", "own", "heads", own.texts, generator.permutation(own.labels))
    return lm, planted.planted_sae(directions), tokens.index(last[0]), [own, chance]


@pytest.fixture(scope="module")
def report(case, tmp_path_factory) -> ProbeReport:
    lm, sae, _, sets = case
    return probe_sets(sae, lm, sets, CONFIG, folder=tmp_path_factory.mktemp("probing"), progress=False)


def test_a_planted_feature_is_found_and_chance_is_chance(case, report):
    feature = case[2]
    assert [(draw.set_name, draw.regime, draw.number) for draw in report.draws[:3]] == [
        ("planted", "standard", 0), ("planted", "standard", 1), ("planted", "few 8", 0),
    ]  # fmt: skip
    for draw in report.of("standard")["planted"]:
        assert draw.outcomes["k=1"].auc == 1.0 and draw.feature == feature
    assert all(0.25 < draw.outcomes["raw"].auc < 0.75 for draw in report.of("standard")["chance"])
    assert report.regimes == ["standard", "few 8", "noise 0.1"] and list(report.of("few 8")) == ["planted"]
    assert report.methods == ["raw", "pca", "tokens", "k=1", "k=2", "all"]


def test_an_interrupted_run_goes_on(case, tmp_path, monkeypatch):
    lm, sae, _, sets = case
    once, own = replace(CONFIG, n_splits=1), sets[:1]
    uninterrupted = probe_sets(sae, lm, own, once, folder=tmp_path / "a", progress=False).data()
    calls, threads = 0, torch.get_num_threads()
    measure = running.outcome

    def counted(*args: Any) -> Outcome:
        nonlocal calls
        calls += 1
        if calls == 10:  # in the second of the three splits
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(running, "outcome", counted)
    with pytest.raises(KeyboardInterrupt):
        probe_sets(sae, lm, own, once, folder=tmp_path / "b", progress=False)
    for _ in range(2):
        assert probe_sets(sae, lm, own, once, folder=tmp_path / "b", progress=False).data() == uninterrupted
        assert calls == 10 + 6 * 2
    probe_sets(sae, lm, own, replace(once, ks=(1,), n_hard_sets=0), folder=tmp_path / "b", progress=False)
    assert calls == 22 + 5 and torch.get_num_threads() == threads


def test_another_sae_on_the_hook_reads_the_same_rows(case, tmp_path, monkeypatch):
    lm, sae, feature, sets = case
    small = replace(CONFIG, n_splits=1, n_hard_sets=0)
    probe_sets(sae, lm, sets, small, folder=tmp_path, progress=False)
    monkeypatch.setattr(running.Harvest, "_last", lambda *_: pytest.fail("the model ran again"))
    other = planted.planted_sae(torch.roll(sae.W_enc.detach(), 1, 0))
    found = probe_sets(other, lm, sets, small, folder=tmp_path, progress=False)
    assert found.draws[0].feature == feature + 1


def test_what_is_refused(case, tmp_path):
    lm, sae, _, sets = case
    with pytest.raises(ValueError, match="reads one language model, got a list"):
        probe_sets(sae, [lm], sets, folder=tmp_path)
    with pytest.raises(ValueError, match="Two of the sets are named 'planted'"):
        probe_sets(sae, lm, [sets[0], sets[0]._replace(origin="x")], folder=tmp_path)
    with pytest.raises(ValueError, match=r"A set is named '../x'; expected letters"):
        probe_sets(sae, lm, [sets[0]._replace(name="../x")], folder=tmp_path)
    with pytest.raises(SaelabError, match="None of the sets is large enough"):
        probe_sets(sae, lm, [sets[0]._replace(texts=sets[0].texts[:9], labels=sets[0].labels[:9])], folder=tmp_path)
    with locked(tmp_path, ""), pytest.raises(SaelabError, match="Another process is probing"):
        probe_sets(sae, lm, sets, folder=tmp_path)
    with lm.steer(_feature(sae)), pytest.raises(ValueError, match="being steered"):
        probe_sets(sae, lm, sets, folder=tmp_path)


def _feature(sae: Any) -> Any:
    from saelab.steering import FeatureHandle

    return FeatureHandle(sae, 0, planted.HOOK).add(1.0, unit="raw")


# --- the report, by hand


def draws_of(aucs: dict[str, list[tuple[float, ...]]], n_sets: int = 1) -> ProbeReport:
    """A report with, for each method, (validation, test) on two splits of a set; several sets that differ by hundredths."""
    draws = [
        Draw(f"s{i}", "standard", split, {
            name: Outcome(of[2 * split], of[2 * split + 1] + 0.001 * i * (name == "k=1"), 0.5, 0, 1.0)
            for name, (of,) in aucs.items()
        })
        for i in range(n_sets) for split in range(2)
    ]  # fmt: skip
    sets = [ProbedSet(f"s{i}", "own", "yes", 9) for i in range(n_sets)]
    config = ProbeConfig(ks=(1,), n_splits=2, n_hard_sets=0)
    return ProbeReport(sets, draws, config, {"sae": "0" * 64, "model": "m", "hooks": ["h"]})


BASE = {"raw": [(0.8, 0.70, 0.8, 0.72)], "pca": [(0.8, 0.99, 0.9, 0.74)], "tokens": [(0.5, 0.6, 0.5, 0.6)]}


def test_validation_chooses_and_test_is_compared():
    found = draws_of(BASE | {"k=1": [(0.9, 0.60, 0.9, 0.99)]})
    # split 0: raw (first of equals), then k=1; split 1: pca both times, as k=1 only ties with it
    (arrow,) = found.arrows("standard")
    assert arrow[1:] == pytest.approx(((0.70 + 0.74) / 2, (0.60 + 0.74) / 2, 0.5))
    raw, pca, _, k = found.rows("standard")
    assert raw.gain.mean == 0 and pca.gain.mean == pytest.approx((0.29 + 0.02) / 2)
    assert k.auc.mean == pytest.approx(0.795) and k.noise == pytest.approx(1.96 * math.sqrt(2 * (0.39**2 / 2) / 2))


@pytest.mark.parametrize(
    ("test", "n_sets", "said"),
    [(0.70, 12, "no gain"), (0.90, 12, "a gain"), (0.50, 12, "a loss"), (0.90, 9, "too few sets to tell a gain")],
)
def test_the_verdict(test, n_sets, said):
    base = {name: [(0.5, 0.7, 0.5, 0.7)] for name in BASE}
    found = draws_of(base | {"k=1": [(0.9, test - 0.0055, 0.9, test - 0.0055)]}, n_sets)
    assert found.verdict("standard").startswith(f"standard: {said} from SAE probes: AUC 0.7000 with the baselines")
    assert "chosen on 100% of the splits" in found.verdict("standard")
    believed = found.believed("standard")
    assert (
        believed is not None
        and "0.0000 (k=1)" in believed
        and conclusions(found) == [found.verdict("standard"), believed]
    )


def test_redrawn_splits_make_no_larger_difference_than_said_once_in_twenty():
    generator = np.random.default_rng(0)
    aucs = generator.normal(size=(2, 4000, 30, 3)) * 0.03 + generator.random((30, 1))
    differences = np.abs(np.subtract(*aucs.mean((2, 3))))
    noise = redraw_noise(aucs[0, 0].tolist())
    assert noise is not None and 0.02 < (differences > noise).mean() < 0.1
    assert redraw_noise([[0.7], [0.8]]) is None


def test_the_quiver_points_from_the_baseline_to_the_candidates():
    plot = quiver([Arrow(HOSTILE, 0.6, 0.8, 1.0), Arrow("down", 0.9, 0.7, 1.0), Arrow("same", 0.75, 0.75, 0.0)])
    assert plot.count("<circle") == 3 and plot.count("#0072b2") == 2 == plot.count("#d55e00")
    assert plot.index("&lt;img") < plot.index("same") < plot.index("down") and "<img" not in plot
    with pytest.raises(ValueError, match="at least one arrow"):
        quiver([])


def test_the_page_and_the_json_name_every_origin_and_escape_it(report, tmp_path):
    page = report_html(report)
    assert "<img" not in page and "&lt;img" in page and page.count("<svg") == 3 and "\u202e" not in page
    path, written = save(report, tmp_path / "report.json")
    assert written.read_text(encoding="utf-8") == page
    data = json.loads(path.read_text(encoding="utf-8"))
    assert [one["origin"] for one in data["sets"]] == [HOSTILE, "own"] and len(data["draws"]) == 8
    assert data["regimes"]["few 8"]["verdict"] == report.verdict("few 8") and len(told(report)) == 2 + 3 + 1
    assert title("k=1") == "the best SAE feature" and title("k=16") == "SAE features, the best 16"


def test_the_flags_are_the_fields_of_the_config():
    assert dataclasses.asdict(ProbeFlags()) == dataclasses.asdict(ProbeConfig())
    assert list(methods((3,))) == ["raw", "pca", "tokens", "k=3", "all"]
