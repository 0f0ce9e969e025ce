"""Probes by numbers a reader can check: scores, splits, the choice of features, and that only training rows teach anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saelab.probing.config import ProbeConfig
from saelab.probing.fitting import best_feature, outcome
from saelab.probing.methods import BASELINES, Columns, methods, ranked
from saelab.probing.regimes import Regime, split, validation_folds
from saelab.probing.scores import auc, balanced_accuracy

N = 240
PLANTED = 5
METHODS = methods((1, 4, 1000))


@pytest.fixture(scope="module")
def y() -> np.ndarray:
    return np.arange(N) % 2 == 0


@pytest.fixture(scope="module")
def columns(y) -> Columns:
    """Activations and tokens that lean towards the label; feature `PLANTED` fires where it is yes and nowhere else."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(N, 20, generator=generator).double()
    raw[:, 0] += torch.from_numpy(y).double()
    features = torch.relu(torch.randn(N, 12, generator=generator).double() - 1) * 9
    features[:, PLANTED] = torch.from_numpy(y) * torch.rand(N, generator=generator).double().clamp_min(0.1)
    often = torch.tensor([0.2] * 20 + [0.01] * 10)  # of a rare token one half may hold too few to make a column of it
    tokens = (torch.rand(N, 30, generator=generator) < often).double()
    return Columns(raw, features, torch.arange(100, 112), tokens)


# --- scores


def test_auc_counts_pairs_and_half_of_the_ties():
    generator = np.random.default_rng(0)
    y = generator.random(40) < 0.3
    log_odds = generator.integers(0, 6, (3, 40)).astype(float)
    pairs = [np.mean([(a > b) + (a == b) / 2 for a in row[y] for b in row[~y]]) for row in log_odds]
    np.testing.assert_allclose(auc(log_odds, y), pairs)
    assert auc(np.array([3.0, 1.0, 2.0]), np.array([True, False, True])) == 1.0
    with pytest.raises(ValueError, match="both labels, got 2 of yes and 0 of no"):
        auc(np.zeros(2), np.array([True, True]))


def test_balanced_accuracy_of_a_constant_is_one_half():
    y = np.array([True] + [False] * 9)
    assert balanced_accuracy(np.full(10, -1.0), y) == 0.5
    assert balanced_accuracy(np.array([1.0, 1, -1, -1, -1, -1, -1, -1, -1, -1]), y) == pytest.approx((1 + 8 / 9) / 2)


# --- splits


REGIMES = [*ProbeConfig(few=(8,), imbalance=(0.05,), noise=(0.3,)).hard_regimes()]


@pytest.mark.parametrize("regime", [Regime(), *REGIMES], ids=str)
def test_a_split_is_fair_and_repeatable_and_its_test_half_the_same_in_every_regime(y, regime):
    found, standard = split("a", y, regime, 1, 120, 100), split("a", y, Regime(), 1, 120, 100)
    assert not set(found.train) & set(found.test) and y[found.test].sum() == 50 == (~y[found.test]).sum()
    np.testing.assert_array_equal(found.test, standard.test)
    np.testing.assert_array_equal(found.y, split("a", y, regime, 1, 120, 100).y)
    others = (split("a", y, regime, 2, 120, 100), split("b", y, regime, 1, 120, 100))
    assert all(set(other.test) != set(found.test) for other in others)
    counts = {"standard": (60, 60), "few": (4, 4), "imbalance": (60, 3)}
    if regime.kind == "noise":
        assert (found.y != y[found.train]).sum() == 36 and set(found.train) == set(standard.train)
    else:
        assert ((~found.y).sum(), found.y.sum()) == counts[regime.kind]
        np.testing.assert_array_equal(found.y, y[found.train])


def test_a_small_set_shrinks_both_halves(y):
    found = split("a", y[:60], Regime(), 0, 120, 60)
    assert len(found.train) == 40 and len(found.test) == 20


@pytest.mark.parametrize(
    ("n_no", "n_yes", "n_folds", "n_held"), [(64, 64, 1, 24), (500, 500, 1, 100), (20, 7, 6, None), (3, 2, 2, None)]
)
def test_validation_folds(n_no, n_yes, n_folds, n_held):
    y = np.array([False] * n_no + [True] * n_yes)
    folds = validation_folds(y)
    assert len(folds) == n_folds and np.sum(folds, axis=0).max() == 1
    assert all(y[fold].any() and (~y[fold]).any() and y[~fold].any() and (~y[~fold]).any() for fold in folds)
    assert n_held is None or folds[0].sum() == n_held
    assert n_folds == 1 or np.sum(folds, axis=0).min() == 1


def test_one_row_of_a_label_is_refused():
    with pytest.raises(ValueError, match="at least 2 training rows of either label, got 1"):
        validation_folds(np.array([True, False, False]))


# --- methods


def test_features_are_ranked_by_the_difference_of_means_in_units_of_their_size():
    features = torch.tensor([[9.0, 1, 0, 2], [0, 1, 0, 2], [9, 0, 0, 2], [9, 0, 0, 2]]).double()
    labels = torch.tensor([True, True, False, False])
    # differences over mean where it fires: |4.5 - 9| / 9 = 0.5, |1 - 0| / 1 = 1, 0, 0
    assert ranked(features, labels).tolist() == [1, 0, 2, 3]


def test_a_planted_feature_is_found_and_perfect_on_its_own(columns, y):
    rows = split("a", y, Regime(), 0, 160, 80)
    found = outcome(METHODS["k=1"], columns, rows, y)
    assert found.auc == found.validation == 1.0 and best_feature(columns, rows) == 100 + PLANTED
    assert outcome(METHODS["raw"], columns, rows, y).auc < 0.95  # so that 1 is not to be had otherwise


def test_as_many_features_as_there_are_is_the_probe_on_all(columns, y):
    without = columns._replace(features=columns.features.clone())
    without.features[:, PLANTED] = 0
    rows = split("a", y, Regime(), 0, 160, 80)
    all_of_them, k = outcome(METHODS["all"], without, rows, y), outcome(METHODS["k=1000"], without, rows, y)
    assert all_of_them.penalty == k.penalty and all_of_them.auc == k.auc < 1
    assert outcome(METHODS["k=4"], without, rows, y) != k


def test_test_labels_choose_nothing(columns, y):
    rows = split("a", y, Regime(), 0, 160, 80)
    wrong = y.copy()
    wrong[rows.test] = np.random.default_rng(0).permutation(y[rows.test])
    assert best_feature(columns, rows) == 100 + PLANTED
    for name, method in METHODS.items():
        right, other = outcome(method, columns, rows, y), outcome(method, columns, rows, wrong)
        assert (right.validation, right.option, right.penalty) == (other.validation, other.option, other.penalty), name
    assert outcome(METHODS["k=1"], columns, rows, wrong).auc < 0.7


@pytest.mark.parametrize("name", METHODS)
def test_test_rows_teach_nothing(columns, y, name):
    rows = split("a", y, Regime(), 0, 160, 80)
    generator = torch.Generator().manual_seed(1)
    other = Columns(*(one.clone() for one in columns))
    for one in (other.raw, other.features, other.tokens):
        one[torch.from_numpy(rows.test)] = 50 * torch.rand(80, one.shape[1], generator=generator).double()
    fit, labels = torch.from_numpy(rows.train), torch.from_numpy(rows.y)
    for before, after in zip(METHODS[name](columns, fit, labels), METHODS[name](other, fit, labels), strict=True):
        torch.testing.assert_close(before[fit], after[fit])
    assert outcome(METHODS[name], columns, rows, y).validation == outcome(METHODS[name], other, rows, y).validation


def test_features_are_chosen_again_without_the_rows_that_validate(columns, y):
    """A feature that is perfect on the validation rows alone must not be chosen for that."""
    rows = split("a", y, Regime(), 0, 160, 80)
    (held,) = validation_folds(rows.y)
    features = torch.zeros_like(columns.features)
    features[:, 1] = torch.from_numpy(y).double() + 5  # always fires: a small difference in units of its size
    of_validation = torch.from_numpy(rows.train[held])
    features[of_validation, 0] = torch.from_numpy(y[rows.train[held]]).double()
    features[:, 1] = torch.where(torch.from_numpy(np.arange(N) % 7 == 0), 6 - features[:, 1] + 5, features[:, 1])
    probed = columns._replace(features=features)
    assert best_feature(probed, rows) == 100
    assert 0.6 < outcome(METHODS["k=1"], probed, rows, y).validation < 1  # by feature 1; feature 0 never fires outside


def test_principal_components_are_scaled_and_the_number_is_validated(columns, y):
    rows = split("a", y, Regime("few", 8), 0, 160, 80)
    fit, labels = torch.from_numpy(rows.train), torch.from_numpy(rows.y)
    found = list(METHODS["pca"](columns, fit, labels))
    assert [one.shape[1] for one in found] == [2]  # 8 rows span 7 dimensions
    scaled = columns._replace(raw=columns.raw * torch.logspace(-3, 3, 20).double() + 4)
    torch.testing.assert_close(next(METHODS["pca"](scaled, fit, labels)).abs(), found[0].abs())
    assert tuple(METHODS)[:3] == BASELINES


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ks": (1, 1)}, "ks=.* must be different"),
        ({"ks": ()}, "ks=.* at least one"),
        ({"ks": (0,)}, "ks=0 must be at least 1"),
        ({"few": (2,)}, "few=2 must be at least 4"),
        ({"few": (512,)}, "few=.* must not exceed n_train=256"),
        ({"noise": (0.5,)}, "noise=.* between 0 and 0.5"),
        ({"imbalance": (1.0,)}, "imbalance=.* between 0 and 1"),
        ({"n_splits": 0}, "n_splits=0"),
    ],
)
def test_a_config_is_checked(given, said):
    with pytest.raises(ValueError, match=said):
        ProbeConfig(**given)
