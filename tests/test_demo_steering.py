"""The demo shows what it found: the share of failures, and two features with their labels, texts, read-back and cost."""

from __future__ import annotations

import planted_steering as planted
from conftest import build_tokenizer

from saelab.cli import demo_steering


def test_the_two_best_features_are_shown_at_three_strengths(tmp_path, monkeypatch):
    lm, store = planted.planted_store(tmp_path, build_tokenizer())
    monkeypatch.setattr(demo_steering, "STRENGTHS", planted.STRENGTHS)
    lines = list(demo_steering.steering_lines(lm, store))
    assert lines[0].startswith("Of 8 features that were tried, ") and "failed" in lines[0]
    heads = [line for line in lines if line.startswith("feature ")]
    shown = store.rows_of([int(head.split()[1]) for head in heads])
    assert shown[0]["feature"] == planted.STEERS and len(shown) == 2
    assert [row["steer_score"] for row in shown] == [row["steer_score"] for row in store.table("steer_score", limit=2)]
    assert all(f"({row['label']}): best at " in head for row, head in zip(shown, heads, strict=True))
    start = lines.index(heads[0])
    assert [line.split()[0] for line in lines[start + 1 : start + 5]] == ["unsteered", "0.5", "4", "12"]
