"""`compare`: texts side by side from the same random numbers, their numbers by hand, and the card."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import HOSTILE

from saelab.features.numbers import signed
from saelab.features.reading import read_text
from saelab.features.store import load_features
from saelab.saes import TranscoderConfig, TranscoderSAE
from saelab.steering import Direction, FeatureHandle, Plan, compare
from saelab.steering.compare_html import MAX_BYTES, drafts_html, kept_tokens, strip
from saelab.steering.control import random_control
from saelab.steering.strengths import as_plan, scaled

HOOK = "blocks.1.hook_resid_post"
PROMPT = "The weather today"


@pytest.fixture(scope="module")
def store(hostile_run):
    return load_features(hostile_run)


@pytest.fixture(scope="module")
def feature(store):
    return store.feature(store.table("density", limit=1)[0]["feature"])


@pytest.fixture(scope="module")
def compared(tiny_lm, feature):
    options = {"strengths": [0, 1, 8], "seeds": [3, 11], "max_new_tokens": 12, "progress": False}
    return compare(tiny_lm, [PROMPT, "The old mill"], feature, control=True, **options)


def test_every_text_is_the_one_that_lm_generate_writes(tiny_lm, feature, compared):
    arms = [(one.strength, one.control) for one in compared.texts if one.prompt == 0 and one.seed == 3]
    assert arms == [(None, False), (1.0, False), (8.0, False), (1.0, True), (8.0, True)]  # 0 is the unsteered text
    assert [row["n_texts"] for row in compared.summary] == [4] * 5
    for one in compared.texts:
        edits = [] if one.strength is None else [feature * one.strength]
        if one.control and one.strength is not None:
            edits = scaled(random_control(as_plan(feature)), one.strength).edits
        with tiny_lm.steer(*edits):
            prompt = compared.prompts[one.prompt]
            assert tiny_lm.generate(prompt, 12, temperature=0.8, seed=one.seed) == prompt + one.text
    written = {one.arm: one.ids for one in compared.texts if one.prompt == 0 and one.seed == 11}
    assert len(set(written.values())) > 2  # the strengths tell


def test_numbers_are_those_of_the_unsteered_model_and_sae(tiny_lm, store, feature, compared):
    assert compared.features[0].threshold == 0.25
    for one, row in zip(compared.texts[:10], compared.rows, strict=False):
        ids = torch.tensor([*tiny_lm.to_ids(compared.prompts[one.prompt])[0].tolist(), *one.ids])
        n_prompt = len(ids) - len(one.ids)
        log_probs = tiny_lm.logits(ids)[0].log_softmax(-1)[n_prompt - 1 : -1].gather(1, ids[n_prompt:, None])[:, 0]
        assert one.log_probs == pytest.approx(log_probs.tolist(), abs=1e-4)
        assert row["nll"] == pytest.approx(-float(log_probs.mean()), abs=1e-4)
        values = torch.tensor(read_text(store, tiny_lm, ids).of(feature.feature)[n_prompt:]) / feature.p99
        assert one.values[0] == pytest.approx(values.tolist(), abs=1e-3)
        share = float((values > 0.25).float().mean())
        assert row["read_back"] == pytest.approx(share)
        base = compared.unsteered(one)
        assert row["nll_cost"] == pytest.approx(one.nll - base.nll)
        assert row["read_back_rise"] == pytest.approx(row["read_back"] - compared.read_back(base))
    assert max(row["read_back"] for row in compared.rows) > 0


def test_what_steers_is_reported_and_not_what_reads(tiny_lm, feature):
    found = compare(tiny_lm, PROMPT, feature * 2.0, max_new_tokens=4, progress=False)
    assert [one.edits for one in found.report] == [(repr(feature * 2.0),)] and found.report == tiny_lm.last_report
    assert found.report[0].n_changed > 0


def test_strengths_multiply_what_is_added_and_nothing_else(tiny_lm, feature, store):
    other = store.feature((feature.feature + 1) % 96).handle
    plan = Plan([feature * 2.0, other.clamp(1.0, unit="raw"), Direction(torch.ones(32), HOOK).add(0.1)], on="generated")
    twice = scaled(plan, 2.0)
    assert twice.on == "generated"
    told = [json.loads(one.to_json())["edits"] for one in (plan, twice)]
    assert [edit["value"] for edit in told[1]] == [4.0, 1.0, 0.2] and [edit["value"] for edit in told[0]] == [
        2.0,
        1.0,
        0.1,
    ]
    found = compare(tiny_lm, PROMPT, plan, strengths=[0, 2], max_new_tokens=5, progress=False)
    assert [one.strength for one in found.texts] == [None, 0.0, 2.0]  # at 0 the clamp remains
    with tiny_lm.steer(twice):
        assert tiny_lm.generate(PROMPT, 5) == PROMPT + found.texts[2].text
    assert [one.feature for one in found.features] == [feature.feature, other.feature]


def test_a_control_is_random_and_as_large(feature, tiny_lm):
    (edit,) = as_plan(feature).edits
    (first,), (other,) = (random_control(as_plan(feature), seed).edits for seed in (0, 1))
    decoder, scale = edit.sae.decoder(-1)
    size = (float(edit.value) * decoder[edit.feature] / scale).detach()
    assert float(first.vector.norm()) == pytest.approx(float(size.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(first.vector, other.vector, 0))) < 0.9
    with pytest.raises(ValueError, match="has no control"):
        random_control(Plan([feature.clamp(1.0)]))


def test_features_of_a_direction_are_read_when_asked_for(tiny_lm, feature):
    direction = feature.handle.direction
    bare = compare(tiny_lm, PROMPT, direction, max_new_tokens=3, progress=False)
    assert bare.rows[0]["read_back"] is None and "read back feature" not in bare._repr_html_()
    read = compare(tiny_lm, PROMPT, direction, read=feature, max_new_tokens=3, progress=False)
    assert [one.feature for one in read.features] == [feature.feature]
    sae = TranscoderSAE(TranscoderConfig(48, k=4, hook_name_out="blocks.1.hook_mlp_out"), d_in=32)
    sae.provenance = replace(sae.provenance, origin={"hook_name": "blocks.1.hook_resid_mid"})
    transcoder = FeatureHandle(sae, 3)
    found = compare(tiny_lm, PROMPT, transcoder.add(3.0, unit="raw"), max_new_tokens=3, progress=False)
    assert [one.feature for one in found.features] == [3] and not found.features[0].in_p99


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strengths": []}, "expected numbers"),
        ({"strengths": [1, 1]}, "each once"),
        ({"strengths": float("nan")}, "expected numbers"),
        ({"strengths": [0]}, "0 is the unsteered text"),
        ({"seeds": [1, 2], "temperature": 0.0}, "temperature above 0"),
        ({"seeds": [-1]}, "a seed=-1"),
        ({"prompts": {"text": ["a"]}}, "prompts is a dict"),
        ({"edits": []}, "nothing to steer with"),
        ({"edits": [3]}, "neither a feature nor an edit"),
        ({"edits": "clamp", "strengths": [1, 2]}, "multiply what is added"),
    ],
)
def test_what_cannot_be_compared(tiny_lm, feature, options, words):
    edits = options.pop("edits", feature)
    edits = feature.clamp(1.0) if edits == "clamp" else edits
    with pytest.raises(ValueError, match=words):
        compare(tiny_lm, options.pop("prompts", PROMPT), edits, max_new_tokens=2, progress=False, **options)


def test_no_prompt_is_refused_and_one_edit_is_a_plan(tiny_lm, feature):
    with pytest.raises(ValueError, match="asks for no text"):
        compare(tiny_lm, [], feature)
    assert Plan(feature * 2.0).to_json() == Plan([feature * 2.0]).to_json()
    assert f"feature {feature.feature}" in repr(feature * 2.0) and "(2 p99)" in repr(feature * 2.0)
    assert len(repr(feature.handle.direction.add(3.0))) < 120
    with pytest.raises(ValueError, match="no plan file"):
        Plan.load("nowhere.json")


def test_inside_a_block_nothing_would_be_unsteered(tiny_lm, feature):
    with pytest.raises(ValueError, match="is being steered"), tiny_lm.steer(feature * 1.0):
        compare(tiny_lm, PROMPT, feature)


def test_texts_are_read_while_they_grow(tiny_lm, feature):
    how = {"strengths": [1, 8], "seeds": [0, 1], "max_new_tokens": 9, "progress": False}
    told = []
    found = compare(tiny_lm, PROMPT, feature, on_step=lambda n, texts: told.append(texts(read=True)), **how)
    assert found.rows == compare(tiny_lm, PROMPT, feature, **how).rows and found.report[0].n_changed > 0
    for draft, last in zip(told[-1], found.texts, strict=True):
        assert draft.values == last.values and draft.log_probs == last.log_probs
    html = drafts_html(told[-1], PROMPT, told[0])
    assert html.count("read back") == 6 and html.count("cost ") == 4 and "read back" not in drafts_html(told[0], PROMPT)
    rows = {(row["strength"], row["seed"]): row for row in found.rows}
    said = drafts_html(told[-1], PROMPT, told[-1])
    assert all(f"read back {row['read_back']:.2f}" in said for row in rows.values())
    assert f"cost {signed(rows[8.0, 1]['nll_cost'], 2)}" in said


def test_texts_are_told_while_they_grow(tiny_lm, feature):
    told = []
    found = compare(
        tiny_lm, PROMPT, feature, strengths=[1, 8], seeds=[0, 1], max_new_tokens=9, progress=False,
        on_step=lambda n, texts: told.append((n, texts())),
    )  # fmt: skip
    assert [n for n, _ in told] == list(range(1, len(told) + 1))
    for n, drafts in told:
        assert [one.ids for one in drafts] == [one.ids[:n] for one in found.texts]
    assert [one.text for one in told[-1][1]] == [one.text for one in found.texts]


def test_the_card_holds_every_text_and_no_markup_of_theirs(tiny_lm, feature, compared, tmp_path):
    page = compared.save(tmp_path / "card.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "script" not in page and "prefers-color-scheme:dark" in page
    assert len(page.encode()) < MAX_BYTES and page.count('class="sc-row"') == len(compared.texts) == 20
    assert page.count('class="sc-bars"') == 20 and "<mark>" in page and "<i>" in page
    assert f"add 1 p99 of feature {feature.feature} at {HOOK}</bdi></h3>" in page
    hostile = compare(tiny_lm, HOSTILE, feature, max_new_tokens=2, progress=False)._repr_html_()
    tags = {
        "style",
        "div",
        "h3",
        "h4",
        "bdi",
        "table",
        "tr",
        "th",
        "td",
        "p",
        "b",
        "span",
        "i",
        "mark",
        "br",
        "svg",
        "path",
        "g",
        "text",
    }
    assert (
        set(re.findall(r"<([a-zA-Z0-9]+)", hostile)) <= tags and "&lt;script&gt;" in hostile and "\u202e" not in hostile
    )


def test_any_number_of_texts_stays_under_the_size(compared):
    piece = "</b>\u202e\"'<script>alert(1)</script>".encode()
    one = compared.texts[0]
    long = one._replace(ids=(5,) * 512, pieces=(piece,) * 512, log_probs=(-1.0,) * 512, values=((0.1, 1.0) * 256,))
    texts = tuple(arm._replace(seed=seed) for seed in range(40) for arm in (long, long._replace(strength=1.0)))
    page = replace(compared, texts=(*texts, one._replace(seed=99)))._repr_html_()
    assert len(page.encode()) < MAX_BYTES and "Not all of the 81 texts fit" in page and "<script" not in page


def test_diff_and_strip_by_hand(compared):
    base = compared.texts[0]._replace(ids=(1, 2, 3, 4, 5), pieces=(b"a",) * 5)
    other = base._replace(strength=1.0, ids=(1, 9, 3, 4, 8), pieces=(b"a",) * 5)
    found = replace(compared, texts=(base, other))
    assert kept_tokens(found, other) == [True, False, True, True, False] and kept_tokens(found, base) == [True] * 5
    assert strip([0.0, -1.3, -2.6, -50.0]) == "\u2581\u2582\u2583\u2588"
    assert other._replace(ids=(1, 2, 1, 2, 1)).repeated == 0.5


def test_printed_it_is_text_with_marks(compared):
    said = str(compared)
    assert said.startswith(f"{PROMPT} ... (seed 3)") and "\u27e6" in said and "unsteered" in said
    assert max(map(len, said.split("\n"))) <= 112 and said.count("\u2584") > 10
    assert said.endswith("\n".join(compared.numbers())) and len(compared.numbers()) == 6
    rows = compared.data()
    assert json.loads(json.dumps(rows)) == rows and len(rows["texts"]) == 20
