"""Planted data is what it says: frequencies, exclusions, right angles, strengths, and the same again for the same seed."""

from itertools import islice

import pytest
import torch

from saelab.benchmarks.planted import SPREAD, WEAK, Planted, diffing, hierarchy, low_coherence, superposition
from saelab.benchmarks.recovery import recovery
from saelab.saes import TopKConfig, TopKSAE

N = 20_000
KINDS = {
    "flat": superposition,
    "zipf": lambda seed: superposition(seed, zipf=True),
    "mixed": lambda seed: superposition(seed, mixed=True),
    "noisy": lambda seed: superposition(seed, noise=0.3),
    "signed": lambda seed: superposition(seed, signed=True),
    "hierarchy": hierarchy,
    "diffing": diffing,
}


def codes(planted: Planted, n: int = N, seed: int = 0) -> torch.Tensor:
    return planted.sample(n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_data_other_seed_other_data(kind):
    first, again, other = (KINDS[kind](seed) for seed in (0, 0, 1))
    assert torch.equal(first.features, again.features)
    assert not torch.equal(first.features, other.features)
    rows = [list(islice(planted.stream(seed, 100), 2)) for planted, seed in ((first, 3), (again, 3), (first, 4))]
    assert torch.equal(torch.cat(rows[0]), torch.cat(rows[1]))
    assert not torch.equal(rows[0][0], rows[0][1])
    assert not torch.equal(rows[0][0], rows[2][0])
    assert torch.equal(first.held_out(100, 3), again.held_out(100, 3))
    assert not torch.equal(first.held_out(100, 3), rows[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_groups_share_out_features_and_rows_are_sums_of_them(kind):
    planted = KINDS[kind](0)
    assert sum(len(planted.features[group]) for group in planted.groups.values()) in (0, len(planted.features))
    x = planted.rows(50, torch.Generator().manual_seed(1))
    expected = torch.einsum("nf,f...->n...", codes(planted, 50, 1), planted.features)
    assert (x - expected).abs().max() <= 6 * planted.noise + 1e-5


def test_noise_has_the_given_standard_deviation():
    x = superposition(0, noise=0.3).rows(2000, torch.Generator().manual_seed(1))
    clean = superposition(0).rows(2000, torch.Generator().manual_seed(1))
    assert float((x - clean).std()) == pytest.approx(0.3, rel=0.02)


def test_features_have_length_1_and_keep_apart():
    rows = low_coherence(64, 32, seed=0)
    assert torch.allclose(rows.norm(dim=1), torch.ones(64))
    cosine = (rows @ rows.T).fill_diagonal_(0).abs().max()
    assert cosine < 0.25 < (low_coherence(64, 32, seed=0, steps=0) @ rows.T).abs().max()


def test_an_untrained_sae_of_the_same_seed_does_not_start_from_the_features():
    planted = superposition(0)
    start = TopKSAE(TopKConfig(64, 3), 32, seed=0).W_dec.detach()
    assert recovery(planted.features, start)["mmcs"] < 0.6


def test_flat_features_are_active_equally_often_three_a_token_around_1():
    active = codes(superposition(0))
    assert bool(((active != 0).sum(1) == 3).all())
    share = (active != 0).float().mean(0)
    assert (share - 3 / 64).abs().max() < 0.01
    values = active[active != 0]
    assert values.min() > 0
    assert abs(values.mean().item() - 1) < 0.01 and abs(values.std().item() - SPREAD) < 0.01


def test_zipf_frequencies_fall_as_one_over_the_rank():
    planted = superposition(0, zipf=True)
    active = codes(planted, 200_000) != 0
    assert bool((active.sum(1) == 3).all())
    share = active.float().mean(0)
    ranks = torch.arange(8, 65).float()  # the first few fill up: they cannot be drawn twice for one token
    slope = torch.linalg.lstsq(torch.stack([ranks.log(), torch.ones_like(ranks)], 1), share[7:].log()[:, None]).solution
    assert -1.1 < slope[0].item() < -0.9
    assert share[planted.groups["common"]].min() > share[planted.groups["rare"]].max()


def test_mixed_tokens_hold_one_feature_or_six_three_on_average():
    counts = (codes(superposition(0, mixed=True)) != 0).sum(1)
    assert set(counts.tolist()) == {1, 6}
    assert abs((counts == 1).float().mean().item() - 0.6) < 0.02


def test_signed_features_are_positive_and_negative_equally_often():
    active = codes(superposition(0, signed=True))
    assert abs((active > 0).sum().item() / (active != 0).sum().item() - 0.5) < 0.02


def test_children_come_with_their_parent_exclude_each_other_and_are_orthogonal_to_it():
    planted = hierarchy(0)
    parents, children = (planted.features[planted.groups[name]] for name in ("parents", "children"))
    families = children.unflatten(0, (8, 4))
    assert torch.allclose(parents @ parents.T, torch.eye(8), atol=1e-5)
    assert torch.einsum("pcd,pd->pc", families, parents).abs().max() < 1e-5
    assert torch.allclose(children.norm(dim=1), torch.ones(32))
    active = codes(planted) != 0
    of_parent, of_child = active[:, :8], active[:, 8:].unflatten(1, (8, 4))
    assert bool((of_parent.sum(1) == 1).all())
    assert bool((of_child.sum((1, 2)) <= 1).all())
    assert not bool(of_child.any(2)[~of_parent].any())
    assert abs(of_child.any(2).any(1).float().mean().item() - 0.75) < 0.02


def test_exclusive_features_are_zero_in_the_other_source_and_weak_ones_weak():
    planted = diffing(0)
    strength = planted.features.norm(dim=2)  # (n_features, 2)
    assert planted.features.shape == (36, 2, 24)
    for name, expected in {
        "shared": (1, 1),
        "only_first": (1, 0),
        "only_second": (0, 1),
        "weak_in_first": (WEAK, 1),
    }.items():
        assert torch.allclose(strength[planted.groups[name]], torch.tensor(expected).float().expand(1, 2), atol=1e-5)
    weak = planted.features[planted.groups["weak_in_first"]]
    assert torch.allclose(weak[:, 0], WEAK * weak[:, 1])
    assert planted.held_out(7, 0).shape == (7, 2, 24)
