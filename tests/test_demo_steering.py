"""The demo shows what it found: the share of failures, and two features with their labels, texts, read-back and cost."""

from __future__ import annotations

import json
import shutil

import planted_steering as planted
from conftest import build_tokenizer

from saelab.cli import demo_steering, main


def test_the_two_best_features_are_shown_at_three_strengths(tmp_path, monkeypatch):
    lm, store = planted.planted_store(tmp_path, build_tokenizer())
    monkeypatch.setattr(demo_steering, "STRENGTHS", planted.STRENGTHS)
    lines = list(demo_steering.steering_lines(lm, store))
    assert lines[0].startswith("Of 8 features that were tried, ") and "failed" in lines[0]
    heads = [line for line in lines if line.startswith("feature ")]
    shown = store.rows_of([int(head.split()[1]) for head in heads])
    assert shown[0]["feature"] == planted.STEERS and len(shown) == 2
    assert [row["steer_score"] for row in shown] == [row["steer_score"] for row in store.table("steer_score", limit=2)]
    assert "(The" in heads[0] and "): best at " in heads[0]
    start = lines.index(heads[0])
    assert [line.split()[0] for line in lines[start + 1 : start + 5]] == ["unsteered", "0.5", "4", "12"]


def test_the_command_lists_what_was_found(hostile_run, tiny_folder, tmp_path, capsys):
    run = shutil.copytree(hostile_run, tmp_path / "run")
    words = [
        "find",
        str(run),
        "--feature",
        "3",
        "5",
        "--max-new-tokens",
        "4",
        "--prompt",
        "The river",
        "--model",
        str(tiny_folder),
    ]
    assert main.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["n_tried"] == 2 and {row["feature"] for row in told["rows"]} == {3, 5}
    assert main.main([*words, "--limit", "1"]) == 0
    printed = capsys.readouterr().out
    assert "2 features tried on 1 prompts" in printed and "Which criterion predicts what" not in printed
