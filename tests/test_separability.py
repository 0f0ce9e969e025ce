"""The Jensen-Shannon distance is a metric with the known ends, and the score of features is that of their histograms."""

from __future__ import annotations

import pytest
import torch

from saelab.features.separability import js_distance, js_divergence, separability


def distributions(n: int, bins: int = 9) -> torch.Tensor:
    return torch.rand(n, bins, generator=torch.Generator().manual_seed(n)).double().pow(3).softmax(1)


def test_it_is_a_metric():
    a, b, c = distributions(300).split(100)
    assert torch.equal(js_distance(a, a), torch.zeros(100).double())
    torch.testing.assert_close(js_distance(a, b), js_distance(b, a))
    assert bool((js_distance(a, c) <= js_distance(a, b) + js_distance(b, c) + 1e-12).all())
    left, right = torch.tensor([[0.3, 0.7, 0, 0]]), torch.tensor([[0, 0, 1.0, 0]])
    assert float(js_distance(left, right)) == pytest.approx(1)
    torch.testing.assert_close(js_distance(a, b).square(), js_divergence(a, b))


@pytest.mark.parametrize(
    ("concept", "others", "wanted"),
    [
        ([1.0] * 50, [0.0] * 50, 1.0),  # fires on every token of the concept, on no other
        ([1.0] * 50, [1.0] * 50, 0.0),
        ([0.0] * 50, [0.0] * 50, 0.0),  # never fired
        ([1.0, 0.0] * 25, [1.0, 0.0] * 20, 0.0),  # as often in sets of different sizes
        ([5.0] * 50, [1.0] * 50, 1.0),  # fires everywhere, at other strengths
        ([-5.0] * 50, [1.0] * 50, 1.0),
        ([1.0, 0.0] * 25, [0.0] * 50, (0.8112781 - 0.5) ** 0.5),  # JSD = H(1/4) - H(1/2) / 2 in bits
    ],
)
def test_by_hand(concept, others, wanted):
    values = torch.tensor([*concept, *others])
    fired = values != 0
    flags = torch.tensor([True] * len(concept) + [False] * len(others))
    features = torch.full((int(fired.sum()),), 3)
    found = separability(values[fired], features, flags[fired], (len(concept), len(others)), 5)
    assert found.tolist() == pytest.approx([0, 0, 0, wanted, 0], abs=1e-6)


def test_features_do_not_mix():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(400, 6, generator=generator).relu() * torch.tensor([1, 2, 0, 1, 1, 3])
    dense[:200, 4] += 2
    concept = torch.arange(400) < 200
    rows, features = dense.nonzero(as_tuple=True)
    shuffled = torch.randperm(len(rows), generator=generator)
    rows, features = rows[shuffled], features[shuffled]
    together = separability(dense[rows, features], features, concept[rows], (200, 200), 6)
    for i in range(6):
        here = features == i
        one = separability(dense[rows, features][here], features[here], concept[rows][here], (200, 200), 6)
        assert float(one[i]) == float(together[i])
    assert int(together.argmax()) == 4 and float(together[2]) == 0
