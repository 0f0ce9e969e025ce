"""A curve that is thinned keeps its ends."""

import json

import pytest

from saelab.app import page_runs


@pytest.mark.parametrize("n", [0, 1, 2, 999, 1000, 1001, 1500, 1999, 2000, 2001, 12_345])
@pytest.mark.parametrize("torn", [False, True])
def test_a_thinned_curve_keeps_its_first_and_last_point(tmp_path, n, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(n)) + ('{"st' if torn else ""))
    steps = [point["step"] for point in page_runs.read_metrics(path)]
    assert len(steps) == min(n, 1000) and steps == sorted(set(steps))
    assert not n or (steps[0], steps[-1]) == (0, n - 1)
