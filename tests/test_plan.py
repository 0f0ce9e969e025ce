"""Plans: what is saved steers as what was built, and text that is no plan is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_saes import config_of

from saelab.edits.direction import Range
from saelab.errors import SaelabError
from saelab.saes import VARIANTS
from saelab.steering import Direction, FeatureHandle, Plan
from saelab.steering.compare_html import _name
from saelab.steering.strengths import scaled

HOOK, PROMPT = "blocks.1.hook_resid_post", "The weather today is fine, and the river runs"


@pytest.fixture(scope="module")
def sae():
    made = VARIANTS["abs_topk"](config_of("abs_topk", 64), 32, seed=3)
    made.provenance = replace(made.provenance, origin={"hook_name": HOOK})
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def active(sae, tiny_lm) -> int:
    """The feature that fires on most tokens of the prompt."""
    x = next(iter(tiny_lm.stream_activations([PROMPT], [HOOK])))[HOOK][0, 1:].clone()
    return int((sae.encode(x).to_dense() != 0).sum(0).argmax())


class Store:
    """As much of a feature store as a plan needs: units and ends."""

    def __init__(self, sae):
        self.sae, self.d_sae, self.manifest = sae, sae.d_sae, {"sae": {"hash": sae.hash}}

    def feature(self, index: int):
        return Row(self.sae, index)


class Row:
    def __init__(self, sae, index: int, end: Any = 0):
        self.handle = FeatureHandle(sae, index, HOOK, {"p99": 2.0, "max": 4.0, "mean": 1.0}, end=end)
        self.of = sae, index

    @property
    def positive(self):
        return Row(*self.of, 1)

    @property
    def negative(self):
        return Row(*self.of, -1)


EDITS = {
    "add": lambda f, d: [f * 2.0],
    "add in another unit": lambda f, d: [f.add(-0.5, unit="max")],
    "add along the stream": lambda f, d: [f.add(0.3, unit="resid_norm")],
    "clamp": lambda f, d: [f.clamp(1.5)],
    "clamp where it fires": lambda f, d: [f.clamp(0.5, unit="mean", where="fires")],
    "clamp by position": lambda f, d: [f.clamp(torch.linspace(0, 1, 40))],
    "scale": lambda f, d: [f.scale(0.25)],
    "ablate": lambda f, d: [f.ablate()],
    "cap": lambda f, d: [f.cap(-0.1, 0.2)],
    "cap on one side": lambda f, d: [f.cap(max=-5.0, unit="raw")],
    "project out": lambda f, d: [f.project_out()],
    "directions": lambda f, d: [d * 2.0, d.add(0.1, unit="resid_norm"), d.scale(0.5)],
    "direction clamped": lambda f, d: [d.clamp(3.0)],
    "direction capped": lambda f, d: [d.cap(min=-0.5)],
    "direction projected out": lambda f, d: [d.project_out()],
    "several": lambda f, d: [f * 1.0, d * -1.0],
}
OPTIONS = [
    {},
    {"on": "prompt", "keep_norm": True},
    {"positions": [2, -1], "cap": 0.5},
    {"window": (-4, None)},
]


@pytest.mark.parametrize("end", [0, 1, -1])
@pytest.mark.parametrize("case", EDITS)
def test_a_saved_plan_steers_the_same(tiny_lm, sae, active, case, end, tmp_path):
    store = Store(sae)
    feature, direction = Row(sae, active, end).handle, Direction(torch.linspace(-1, 1, 32), HOOK)
    plain = tiny_lm.logits(PROMPT)
    for options in OPTIONS:
        plan = Plan(EDITS[case](feature, direction), **options)
        for again in (Plan.from_json(plan.to_json(), store), Plan.load(plan.save(tmp_path / "plan.json"), [store])):
            assert again.to_json() == plan.to_json()
            logits = []
            for one in (plan, again):
                with tiny_lm.steer(one):
                    logits.append(tiny_lm.logits(PROMPT))
            assert torch.equal(*logits)
            if not (end and case in ("scale", "ablate", "cap", "cap on one side", "clamp where it fires")):
                assert not torch.equal(logits[0], plain)  # one end of a feature may be silent here


def test_gates_are_saved(tiny_lm, sae):
    direction = Direction(torch.linspace(-1, 1, 32), HOOK)
    for gate in (Row(sae, 9).handle.above(0.01), Direction(torch.ones(32), "blocks.0.hook_resid_post").above(0.2)):
        plan = Plan([direction * 3.0], gate=gate)
        again = Plan.from_json(plan.to_json(), Store(sae))
        logits = []
        for one in (plan, again):
            with tiny_lm.steer(one):
                logits.append(tiny_lm.logits(PROMPT))
        assert torch.equal(*logits) and tiny_lm.last_report[0].n_applied > 0
        assert again.to_json() == plan.to_json()


def test_a_plan_has_its_own_options(tiny_lm, sae):
    plan = Plan([Row(sae, 7).handle * 2.0])
    with (
        pytest.raises(ValueError, match="on, cap: a plan has these options itself"),
        tiny_lm.steer(plan, on="prompt", cap=1.0),
    ):
        pass


def written(**changes) -> str:
    entry = {"do": "add", "value": 1.0, "unit": "raw", "direction": [1.0] * 32, "hook_name": HOOK}
    return json.dumps({"saelab_plan": 1, "edits": [entry]} | changes)


ENTRY = {"feature": 7, "do": "add", "value": 1.0, "unit": "p99", "hook_name": HOOK}


@pytest.mark.parametrize(
    "text, words",
    [
        ("<!doctype html>", "no JSON.*doctype"),
        ("[" * 5000, "no JSON"),
        ("[1, 2]", "no plan of version 1"),
        (written(saelab_plan=2), "version 1 \\(saelab_plan=2\\)"),
        (written(strength=3), "'strength', which is unknown"),
        (written(edits=[]), "list of 1 to 64"),
        (written(edits=[ENTRY] * 65), "list of 1 to 64"),
        (written(edits=["feature 7"]), "expected an object"),
        (written(edits=[ENTRY | {"strenght": 2}]), "'strenght', which is unknown"),
        (written(edits=[ENTRY | {"do": "explode"}]), "do='explode' is unknown"),
        (written(edits=[ENTRY | {"do": "__init__"}]), "do='__init__' is unknown"),
        (written(edits=[ENTRY | {"do": ["add"]}]), "do=.'add'. is unknown"),
        (written(edits=[ENTRY | {"do": "above"}]), "a gate is no edit"),
        (written(edits=[ENTRY | {"do": "scale"}]), "'unit', which is unknown"),
        (written(edits=[ENTRY | {"value": 10**400}]), "which is not a number"),
        (written(edits=[ENTRY | {"value": True}]), "value='True', which is not a number"),
        (written(edits=[ENTRY | {"end": True}]), "end=True"),
        (written(edits=[ENTRY | {"hook_name": 5}]), "hook_name=5"),
        (written(edits=[ENTRY | {"do": "clamp", "value": [10**400]}]), "no array of numbers"),
        (written(saelab_plan=True), "no plan of version 1"),
        (written(keep_norm="no"), "keep_norm='no'"),
        (written(positions=[10**30]), "positions"),
        (written(window=[10**30, None]), "beyond any context"),
        (written(cap=10**400), "cap="),
        (written()[:-1] + ', "edits": []}', "a name twice"),
        (written(edits=[ENTRY | {"feature": 64}]), "feature=64"),
        (written(edits=[ENTRY | {"feature": -1}]), "feature=-1"),
        (written(edits=[ENTRY | {"feature": "7"}]), "feature='7'"),
        (written(edits=[ENTRY | {"sae": "0" * 64}]), "the SAE 000000000000, which is not given"),
        (written(edits=[ENTRY | {"value": "much"}]), "value='much', which is not a number"),
        (written(edits=[ENTRY | {"do": "clamp", "value": [1, "a"]}]), "no array of numbers"),
        (written(edits=[ENTRY | {"value": None}]), "value='None', which is not a number"),
        (written(edits=[ENTRY | {"unit": "furlong"}]), "unit='furlong'"),
        (written(edits=[ENTRY | {"end": 5}]), "end=5"),
        (written(edits=[{key: value for key, value in ENTRY.items() if key != "value"}]), "add of .*missing"),
        (written(edits=[ENTRY | {"min": 1}]), "add of a plan has 'min', which is unknown"),
        (written(edits=[{"do": "add", "value": 1}]), "neither a feature nor a direction"),
        (written(edits=[{"do": "add", "value": 1, "direction": ["a"], "hook_name": HOOK}]), "no list of numbers"),
        (written().replace("1.0]", "NaN]"), "NaN, which is not a finite number"),
        (written(on="later"), "on='later'"),
        (written(positions=[0]), "first token"),
        (written(cap=-1), "cap=-1"),
        (written(gate={"do": "above", "value": 0.5}), "neither a feature nor a direction"),
        (written(gate=ENTRY), "a gate is no edit"),
    ],
)
def test_what_is_no_plan_is_refused(sae, text, words):
    with pytest.raises((ValueError, SaelabError), match=words):
        Plan.from_json(text, Store(sae))


def test_a_feature_needs_its_store(sae):
    text = Plan([Row(sae, 7).handle * 2.0]).to_json()
    with pytest.raises(ValueError, match="which is not given; there: none"):
        Plan.from_json(text)
    with pytest.raises(SaelabError, match="no p99"):
        Plan.from_json(text, sae)
    raw = Plan([Row(sae, 7).handle.add(2.0, unit="raw")])
    assert Plan.from_json(raw.to_json(), sae).to_json() == raw.to_json()


CHANGED = {
    "value": lambda f: replace(f * 2.0, value=9.0),
    "mode": lambda f: replace(f * 2.0, mode="clamp"),
    "feature": lambda f: replace(f * 2.0, feature=8),
    "where": lambda f: replace(f.clamp(2.0), where="fires"),
    "values by position": lambda f: replace(f.clamp(torch.linspace(0, 1, 40)), value=torch.linspace(0, 3, 40)),
    "values of another length": lambda f: replace(f.clamp(torch.linspace(0, 1, 40)), value=torch.linspace(0, 1, 30)),
    "one value of many": lambda f: replace(f.clamp(torch.linspace(0, 1, 40)), value=1.0),
    "bounds": lambda f: replace(f.cap(-0.1, 0.2), bounds=Range(-1.0, 1.0)),
    "strength along the stream": lambda f: replace(f.add(0.3, unit="resid_norm"), strength=0.6),
    "vector": lambda f: replace(f.add(0.3, unit="resid_norm"), vector=torch.ones(32)),
    "vector turned around": lambda f: replace(f.add(0.3, "resid_norm"), vector=-f.direction.vector),
    "vector projected out": lambda f: replace(f.project_out(), vector=torch.ones(32)),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_was_changed_since_it_was_asked_is_not_saved(sae, case, tmp_path):
    """A plan would save the old words."""
    changed = CHANGED[case](Row(sae, 7).handle)
    with pytest.raises(ValueError, match=r"is no longer what was asked of its feature, \{'feature': 7"):
        Plan([changed]).save(tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()
    assert ", ".join(map(str, changed.asked.values())) not in _name(changed)  # nor does a card tell of them


def test_a_gate_that_was_changed_is_not_saved(sae):
    gate = Row(sae, 9).handle.above(0.5)
    for changed in (replace(gate, bound=3.0), replace(gate, feature=8), replace(gate, sign=-1)):
        with pytest.raises(ValueError, match="no longer what was asked"):
            Plan([Row(sae, 7).handle * 1.0], gate=changed).to_json()


def test_edits_at_another_strength_are_saved(sae):
    """What `compare` multiplies is asked for anew, but for the last bit."""
    for end in (0, 1, -1):
        for edit in (Row(sae, 7, end).handle * 0.7, Row(sae, 7, end).handle.add(0.3, unit="resid_norm")):
            for strength in (0.1, 1 / 3, -7.3):
                told = json.loads(scaled(Plan([edit]), strength).to_json())
                assert told["edits"][0]["value"] == edit.asked["value"] * strength


def test_an_edit_of_another_kind_is_not_saved():
    class Custom:
        hook_name = HOOK

        def apply(self, x, positions):
            return x

    with pytest.raises(ValueError, match="Custom.*cannot be saved in a plan"):
        Plan([Custom()]).to_json()


def test_a_mostly_negative_feature_is_not_turned_around(tiny_lm, sae, active):
    """Its sign comes from its store: an SAE alone is refused where that matters. In raw units, too, a gate looks its way."""
    handle = FeatureHandle(sae, active, HOOK, {"p99": -2.0, "max": -4.0, "mean": -1.0})

    class Negative(Store):
        def feature(self, index: int):
            row = Row(sae, index)
            row.handle = handle
            return row

    for plan in (Plan([handle.add(0.5, unit="resid_norm")]), Plan([handle * 1.0], gate=handle.above(0.2, unit="raw"))):
        assert Plan.from_json(plan.to_json(), Negative(sae)).to_json() == plan.to_json()
        if plan.gate is None:
            with pytest.raises(ValueError, match="mostly negative"):
                Plan.from_json(plan.to_json(), sae)
    x = next(iter(tiny_lm.stream_activations([PROMPT], [HOOK])))[HOOK].clone()
    z = sae.encode(x[0]).column(active)
    assert torch.equal(handle.above(0.2, unit="raw").is_open(x)[0], -z > 0.2)
