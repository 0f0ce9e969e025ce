"""Vectors as sums of decoder rows: planted mixtures come back, and the least squares are those of an exhaustive search."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from saelab.edits.decomposition import _non_negative, as_features
from saelab.saes import SAE, CrosscoderConfig, CrosscoderSAE, TopKConfig, TopKSAE
from saelab.steering import Direction

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def sae() -> SAE:
    made = TopKSAE(TopKConfig(256, k=4), d_in=64, seed=0).requires_grad_(False)
    made.W_dec.mul_(torch.linspace(0.5, 2, 256)[:, None])  # rows count as unit vectors whatever their norms
    return made


@pytest.mark.parametrize(
    "planted", [{5: 3.0, 77: 2.0, 200: 0.7}, {9: 1e-3}, {i: 1.0 + i / 100 for i in range(0, 80, 10)}]
)
def test_a_planted_mixture_comes_back(sae, planted):
    units = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    vector = sum(size * units[feature] for feature, size in planted.items())
    rows = Direction(torch.as_tensor(vector), HOOK).as_features(sae, 20)
    assert {row.feature: row.coefficient for row in rows} == pytest.approx(planted, rel=1e-4)
    assert rows[-1].explained == pytest.approx(1, abs=1e-9)
    for row in rows:
        cosine = torch.cosine_similarity(torch.as_tensor(vector), units[row.feature], dim=0)
        assert row.cosine == pytest.approx(float(cosine), abs=1e-5)


def test_the_share_explained_rises_to_that_of_the_sum(sae):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(1))
    rows = Direction(vector, HOOK).as_features(sae, 12)
    explained = [row.explained for row in rows]
    assert len(rows) == 12 == len({row.feature for row in rows}) and explained == sorted(explained)
    assert all(row.coefficient > 0 for row in rows)
    units = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    left = vector - sum(row.coefficient * units[row.feature] for row in rows)
    assert 1 - float(left.square().sum() / vector.square().sum()) == pytest.approx(explained[-1], abs=1e-5)
    again = Direction(vector, HOOK).as_features(sae, 12)
    assert [row.feature for row in rows] == [row.feature for row in again]
    assert [row.coefficient for row in rows] == pytest.approx([row.coefficient for row in again], rel=1e-9)
    chosen, wide = [row.feature for row in rows], units.double()
    for n, feature in enumerate(chosen):  # each is the nearest to what the rows before it leave
        left = vector.double() - _non_negative(wide[chosen[:n]], vector.double()) @ wide[chosen[:n]]
        assert int((wide @ left).argmax()) == feature
    assert rows[0].explained == pytest.approx(rows[0].cosine ** 2)


def test_least_squares_are_those_of_every_subset():
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        rows = torch.randn(5, 4, generator=generator).double()
        target = torch.randn(4, generator=generator).double()
        best = float(target.norm())
        for subset in (list(one) for n in range(1, 6) for one in combinations(range(5), n)):
            solved = torch.linalg.lstsq(rows[subset].T, target[:, None], driver="gelsd").solution[:, 0]
            if bool((solved >= -1e-9).all()):
                best = min(best, float((target - solved @ rows[subset]).norm()))
        found = _non_negative(rows, target)
        assert bool((found >= 0).all()) and float((target - found @ rows).norm()) == pytest.approx(best, abs=1e-7)


def test_nothing_is_found_where_no_row_points(sae):
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec.abs())
    assert Direction(-torch.ones(64), HOOK).as_features(sae) == []


def test_a_crosscoders_source_is_chosen_by_the_hook():
    made = CrosscoderSAE(CrosscoderConfig(32, k=4), d_in=16, n_sources=2).requires_grad_(False)
    made.provenance = replace(made.provenance, origin={"hook_names": [HOOK, "blocks.2.hook_resid_post"]})
    for source in (0, 1):
        row = made.decoder(source)[0][7]
        hook = (HOOK, "blocks.2.hook_resid_post")[source]
        assert Direction(row, hook).as_features(made, 1)[0].feature == 7
    with pytest.raises(ValueError, match="is not a source of this crosscoder"):
        Direction(torch.ones(16), "blocks.0.hook_resid_post").as_features(made)


def test_what_is_refused(sae):
    with pytest.raises(ValueError, match="has width 32, but the decoder rows of this SAE have width 64"):
        Direction(torch.ones(32), HOOK).as_features(sae)
    with pytest.raises(ValueError, match="k=0"):
        as_features(torch.ones(64), sae, 0)
