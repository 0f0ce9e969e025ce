"""The Jensen-Shannon distance is a metric with the known ends, and the score of features is that of their histograms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from saelab.features.separability import histograms, js_distance, js_divergence, pairwise_separability, separability


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


def test_it_is_that_of_torch():
    a, b = distributions(40).split(20)
    middle = ((a + b) / 2).log()
    to_a, to_b = (F.kl_div(middle, side, reduction="none").sum(1) for side in (a, b))
    torch.testing.assert_close(js_distance(a, b), ((to_a + to_b) / 2 / math.log(2)).sqrt())


def sparse(dense: torch.Tensor, sets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, features = dense.nonzero(as_tuple=True)
    return dense[rows, features], features, sets[rows]


def test_several_sets_are_the_mean_over_pairs_in_shared_bins():
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(300, 5, generator=generator).relu() * torch.tensor([1, 2, 0, 1, -3])
    sets, n_tokens = torch.arange(300) % 4 % 3, [150, 75, 75]
    dense[sets == 2, 3] += 2
    shares = histograms(*sparse(dense, sets), n_tokens, 5)
    for (number, n), feature in itertools.product(enumerate(n_tokens), range(5)):
        x, mine = dense[:, feature].double(), dense[sets == number, feature].double()
        on = x[x != 0].sort().values
        wanted = torch.zeros(65).double()
        wanted[0] = (mine == 0).sum()
        if len(on):
            edge = round(0.001 * (len(on) - 1))
            low, high = on[edge], on[len(on) - 1 - edge]
            for value in mine[mine != 0]:
                wanted[1 + min(max(int((value - low) / (high - low) * 64), 0), 63)] += 1
        torch.testing.assert_close(shares[number, feature], wanted / n)
    found = pairwise_separability(*sparse(dense, sets), n_tokens, 5)
    pairs = [js_distance(shares[a], shares[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(found, sum(pairs) / 3)
    assert int(found.argmax()) == 3 and float(found[2]) == 0


def test_the_order_of_sets_and_tokens_does_not_matter():
    dense = torch.randn(200, 4, generator=torch.Generator().manual_seed(2)).relu()
    sets, turn = torch.arange(200) % 4, torch.randperm(200, generator=torch.Generator().manual_seed(3))
    found = pairwise_separability(*sparse(dense, sets), [50] * 4, 4)
    torch.testing.assert_close(pairwise_separability(*sparse(dense[turn], sets[turn]), [50] * 4, 4), found)
    torch.testing.assert_close(pairwise_separability(*sparse(dense, 3 - sets), [50] * 4, 4), found)
