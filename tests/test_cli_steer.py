"""`saelab steer`: features and plan files, strengths and seeds, and the files it writes."""

from __future__ import annotations

import json
import shutil

import pytest

import saelab
from saelab.cli.main import main
from saelab.steering import Plan, compare

pytestmark = pytest.mark.usefixtures("models_load_in_fp32")
FEW = ["--max-new-tokens", "6", "--prompt", "the river"]


@pytest.fixture(scope="module")
def store(hostile_run):
    return saelab.load_features(hostile_run)


@pytest.fixture(scope="module")
def busiest(store):
    return [row["feature"] for row in store.table("density", limit=2)]


def asked(run, capfd, *words):
    assert main(["steer", str(run), *map(str, words), *FEW, "--json"]) == 0, capfd.readouterr().err
    return json.loads(capfd.readouterr().out)


def refused(run, capfd, *words) -> str:
    assert main(["steer", str(run), *map(str, words), *FEW]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    return printed.err


def test_several_features_are_one_plan(hostile_run, store, busiest, tiny_lm, capfd, tmp_path):
    a, b = busiest
    words = ["--feature", a, "--strength", 8, "--feature", b, "--strength", -2, "--on", "generated"]
    found = asked(hostile_run, capfd, *words, "--save-plan", tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json", store)
    assert [(one.feature, one.asked["value"]) for one in plan.edits] == [(a, 8.0), (b, -2.0)] and plan.on == "generated"
    assert json.loads(plan.to_json()) == found["plan"]
    with tiny_lm.steer(plan):
        assert found["steered"] == tiny_lm.generate("the river", 6)
    assert found["default"] == tiny_lm.generate("the river", 6)
    again = asked(hostile_run, capfd, "--plan", tmp_path / "plan.json")
    assert again["steered"] == found["steered"] and again["plan"] == found["plan"]
    assert asked(hostile_run, capfd, "--plan", tmp_path / "plan.json", "--on", "prompt")["plan"]["on"] == "prompt"
    one_for_all = asked(hostile_run, capfd, "--feature", a, b, "--strength", 3)["plan"]["edits"]
    assert [edit["value"] for edit in one_for_all] == [3.0, 3.0]


def test_strengths_and_seeds_are_a_comparison(hostile_run, store, busiest, tiny_lm, capfd, tmp_path):
    words = ["--feature", busiest[0], "--strengths", 0, 1, 8, "--seeds", 1, 5]
    found = asked(hostile_run, capfd, *words, "--control", "--out", tmp_path / "card.html")
    feature = store.feature(busiest[0])
    options = {"strengths": [0, 1, 8], "seeds": [1, 5], "max_new_tokens": 6, "control": True, "progress": False}
    expected = compare(tiny_lm, "the river", feature, **options)
    assert found["texts"] == expected.rows and found["summary"] == expected.summary and found["temperature"] == 0.8
    assert (tmp_path / "card.html").read_text(encoding="utf-8").count('class="sc-row"') == 10
    assert main(["steer", str(hostile_run), *map(str, words), *FEW]) == 0
    assert "(seed 5)" in (said := capfd.readouterr().out) and "over unsteered" in said


def test_a_prompt_of_a_chat(hostile_run, busiest, tiny_lm, capfd):
    found = asked(hostile_run, capfd, "--feature", busiest[0], "--chat")
    assert tiny_lm.chat("the river") + found["default"] == tiny_lm.generate(tiny_lm.chat("the river"), 6)


def test_what_only_adds_is_a_control_vector(hostile_run, store, busiest, capfd, tmp_path):
    gguf = pytest.importorskip("gguf")
    asked(hostile_run, capfd, "--feature", busiest[0], "--strength", 3, "--gguf", tmp_path / "v.gguf")
    (tensor,) = gguf.GGUFReader(tmp_path / "v.gguf").tensors
    (edit,) = Plan([store.feature(busiest[0]) * 3.0]).edits
    assert tensor.name == "direction.1" and tensor.data.shape == (edit.d_in,)
    where = tmp_path / "no.gguf"
    assert "has on" in refused(hostile_run, capfd, "--feature", busiest[0], "--on", "prompt", "--gguf", where)
    clamped = refused(hostile_run, capfd, "--feature", busiest[0], "--mode", "clamp", "--gguf", where)
    assert "depends on the activations" in clamped and not where.exists()


ESCAPES = "the \x1b[31mred\x1b]0;title\x07 \x9b2J\u202eriver\u2069\r\n\u200bthe mill"


def test_text_commands_no_terminal(hostile_run, busiest, capfd, tmp_path):
    """Of the model or the user, alone or side by side, in every command that prints it; ends of lines stay."""
    run = tmp_path / "run"
    shutil.copytree(hostile_run, run)
    for feature in busiest:
        saelab.load_features(run).annotations.add(feature, "label", ESCAPES)
    commands = [
        ["steer", run, "--feature", busiest[0], *FEW, "--prompt", ESCAPES],
        ["steer", run, "--feature", busiest[0], *FEW, "--prompt", ESCAPES, "--seeds", 1, 2],
        ["find", run, "--feature", *busiest, "--max-new-tokens", 4, "--prompt", ESCAPES],
        ["features", run, "--feature", *busiest],
        ["features", run, "--find", ESCAPES],
        ["features", run, "--find", "the"],
        ["steer", run, "--feature", busiest[0], "--plan", tmp_path / ESCAPES],
        ["steer", run, "--plan", tmp_path / ESCAPES],
    ]
    for words in commands:
        code = main([*map(str, words)])
        printed = capfd.readouterr()
        assert code == (2 if "--plan" in words else 0), printed.err
        for char in "\x1b\x07\x9b\u202e\u2069\u200b\r":
            assert char not in printed.out and (char not in printed.err or char == "\r"), (
                words[0],
                char,
            )  # bars have \r
    main(["steer", str(run), "--feature", str(busiest[0]), *FEW, "--prompt", ESCAPES])
    assert (
        "the \u241b[31mred\u241b]0;title\u2407 " in (said := capfd.readouterr().out)
        and "\n\u27e8U+200B\u27e9the mill" in said
    )


def test_files_that_cannot_be_written_are_refused_at_once(hostile_run, busiest, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("saelab.cli.steer_command.load_lm", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    for flag in ("--out", "--save-plan", "--gguf"):
        for path, said in (
            (tmp_path, f"{flag}={str(tmp_path)!r} is a folder"),
            (tmp_path / "file" / "a" / "card", "there is a file where a folder must be"),
            ("", f"{flag}='.' is a folder"),
        ):
            assert said in refused(hostile_run, capfd, "--feature", busiest[0], f"{flag}={path}")
    monkeypatch.setattr("saelab.files.os.access", lambda *_: False)
    said = refused(hostile_run, capfd, "--feature", busiest[0], "--out", tmp_path / "new" / "card.html")
    assert "permission is denied" in said and not (tmp_path / "new").exists()


def test_a_plan_of_another_sae_is_found_in_the_run(hostile_run, busiest, capfd, tmp_path, store):
    run = tmp_path / "two"
    for name in ("sae", "features"):
        shutil.copytree(hostile_run / name, run / name)
    shutil.copytree(hostile_run / "sae", run / "sae-b")
    Plan([store.feature(busiest[0]) * 8.0]).save(tmp_path / "plan.json")
    assert asked(run, capfd, "--plan", tmp_path / "plan.json")["plan"]["edits"][0]["feature"] == busiest[0]
    assert "holds 2 SAEs, each with its own features" in refused(run, capfd, "--feature", busiest[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs --feature 17"),
        (["--feature", 1, "--plan", "p.json"], "not both"),
        (["--plan", "no-such.json"], "no-such.json"),
        (["--feature", 1, 2, "--strength", 1, 2, 3], "3 values for 2 features"),
        (["--feature", 96], "features 0 to 95"),
        (["--feature", 1, "--strengths", "nan"], "expected numbers"),
        (["--feature", 1, "--mode", "ablate", "--strengths", 1, 2], "add nothing"),
        (["--feature", 1, "--mode", "ablate", "--control"], "has no control"),
    ],
)
def test_what_cannot_be_steered_is_one_line(hostile_run, capfd, words, said):
    printed = refused(hostile_run, capfd, *words)
    assert said in printed and len([line for line in printed.splitlines() if line.startswith("saelab:")]) == 1
