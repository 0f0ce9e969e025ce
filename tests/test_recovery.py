"""Cosines between planted and learned features, by hand."""

import math

import pytest
import torch

from saelab.benchmarks.recovery import cosines, recovery

TRUE = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
LEARNED = torch.tensor([[2.0, 0.0], [1.0, 0.1], [0.0, -1.0]])


def test_cosines_do_not_depend_on_lengths():
    near = 1 / math.sqrt(1.01)  # between (1, 0) and (1, 0.1)
    expected = [[1, near, 0], [0, 0.1 * near, -1], [0.6, near * (0.6 + 0.08), -0.8]]
    assert torch.allclose(cosines(TRUE, LEARNED), torch.tensor(expected), atol=1e-6)
    assert torch.allclose(cosines(TRUE, LEARNED, signed=True), torch.tensor(expected).abs(), atol=1e-6)


def test_recovery_by_hand():
    near = 1 / math.sqrt(1.01)
    found = recovery(TRUE, LEARNED, groups={"axes": slice(0, 2), "rest": slice(2, 3)})
    best = [1, 0.1 * near, 0.68 * near]
    assert found["mmcs"] == pytest.approx(sum(best) / 3, abs=1e-6)
    assert found["recovered"] == pytest.approx(1 / 3)
    assert found["copies"] == 2  # (2, 0) and (1, 0.1) are both the first axis
    assert found["mmcs_axes"] == pytest.approx((best[0] + best[1]) / 2, abs=1e-6)
    assert found["recovered_axes"] == 0.5
    assert found["mmcs_rest"] == pytest.approx(best[2], abs=1e-6)
    assert found["recovered_rest"] == 0


def test_signed_features_are_axes():
    found = recovery(TRUE, LEARNED, signed=True)
    assert found["mmcs"] == pytest.approx((1 + 1 + 0.8) / 3, abs=1e-6)
    assert found["recovered"] == pytest.approx(2 / 3)
    assert found["copies"] == 1.5


def test_nothing_recovered_has_no_copies():
    assert recovery(TRUE[:1], torch.tensor([[1.0, 1.0]])) == pytest.approx(
        {"mmcs": math.sqrt(0.5), "recovered": 0.0, "copies": 0.0}
    )
