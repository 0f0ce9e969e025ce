"""The fused step of BatchTopK: exactly the n largest pairs of any batch, in lists that may turn out to be too short."""

import pytest
import torch
from fused_cases import (
    DEVICE,
    all_negative,
    an_sae,
    batch,
    by_feature,
    compare,
    equal_features,
    fused_training,
    in_parts,
    mostly_negative,
    nan_step,
    on_every_token,
    one_step,
    replaced,
    run_of,
    state_after,
)

from saelab.kernels.dispatch import using
from saelab.saes import BatchTopKConfig
from saelab.training import fused_batch_topk, fused_list, fused_step, steps
from saelab.training.cuda_graph import Replayed
from saelab.training.fused_step import FusedStep

CONFIG = BatchTopKConfig(d_sae=20, k=3)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # numpy runs the kernels, also on memory never written


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fused_step, "HORIZON", 2)
    monkeypatch.setattr(steps, "LAG", 1)


def uneven(n_rows, d_in, seed):
    """Most pairs are in two rows, as where a few tokens have huge activations."""
    x = batch(n_rows, d_in, seed)
    x[1] *= 50
    x[4] *= 20
    return x


def some_equal_rows(n_rows, d_in, seed):
    x = batch(n_rows, d_in, seed)
    x[2:5] = x[0]
    return x


def nearly_equal_features(sae):
    """Their order is that of the exact values only: those of half precision differ by more."""
    steps_up = 1 + 1e-4 * torch.arange(10, device=DEVICE)
    sae.W_enc.data[10:] = sae.W_enc.data[0] * steps_up[:, None]
    sae.b_enc.data[10:] = sae.b_enc.data[0] * steps_up


def no_room(monkeypatch):
    monkeypatch.setattr(fused_batch_topk, "power_of_two", lambda n: 4)


CASES = {
    "plain": (None, None, {"n_steps": 3}),
    "uneven rows": (None, None, {"data": uneven}),
    "equal rows and features": (None, equal_features, {"data": some_equal_rows, "exact": False}),
    "nearly equal features": (None, nearly_equal_features, {}),
    "fewer than k": (None, mostly_negative, {}),
    "nothing fires": (None, all_negative, {}),
    "on every token": (None, on_every_token, {}),
    "scores in parts": (in_parts, None, {}),
    "by feature": (by_feature, None, {}),
    "lists too short": (no_room, None, {}),
    "odd sizes": (None, None, {"n_rows": 5, "d_in": 33}),
    "dead features": (None, None, {"n_dead": 7, "n_steps": 2}),
    "end of a run": (None, None, {"run": 3, "n_steps": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_step_of_autograd(monkeypatch, case):
    patch, change, options = CASES[case]
    if patch is not None:
        patch(monkeypatch)
    fused = compare(replaced(CONFIG, k_aux=3), change=change, **options)
    if case in ("plain", "uneven rows"):
        assert fused.fused.kept.offsets[-1] == 18
    if case == "lists too short":
        assert fused.fused.list_room > 4


def test_k_of_all():
    compare(replaced(CONFIG, k=20))


def test_nan_changes_no_weight():
    nan_step(CONFIG)


def test_the_same_bits_after_a_pause_and_with_short_lists(monkeypatch):
    """Features die on the way: the steps that are made again have no room for them, later ones have."""
    monkeypatch.setattr(steps, "LAG", 2)  # two steps are void before the first is known to be
    batches = [batch(6, 12, seed) for seed in range(5)]
    config = replaced(CONFIG, d_sae=12)
    first, resumed = (state_after(config, batches, at, dying=4) for at in (None, 3))
    no_room(monkeypatch)
    short = state_after(config, batches, dying=4)
    assert first["step 4"].numel() == first["step 1"].numel() + 1, "AuxK has no part in the last step"
    for name, value in first.items():
        assert torch.equal(value, resumed[name]) and torch.equal(value, short[name]), name


def test_a_void_step_changes_nothing(monkeypatch):
    no_room(monkeypatch)
    of = run_of(an_sae(CONFIG, 12), 6, 40)
    training = fused_training(of)
    before = {name: value.clone() for name, value in (of.sae.state_dict() | of.adam.state_dict()).items()}
    with using("triton"):
        training({"hook": batch(6, 12, 0)}, 0, 1e-2, True)
    for name, value in (of.sae.state_dict() | of.adam.state_dict()).items():
        assert torch.equal(value, before[name]), name
    assert not of.dead.tokens_since_fired.any()
    assert isinstance(training.fused, FusedStep) and torch.isnan(training.fused.record[fused_list.VOID])
    with using("triton"):
        ((step, values),) = training.settle(1)
    assert step == 0 and values["l0"] == 3 and not torch.equal(of.sae.W_enc, before["W_enc"])


def test_graphs_are_forgotten_with_the_lists_that_they_work_on(monkeypatch):
    forgotten = []
    monkeypatch.setattr(Replayed, "forget", lambda replayed: forgotten.append(replayed))
    no_room(monkeypatch)
    one_step(fused_training(run_of(an_sae(CONFIG, 12), 6, 40)), batch(6, 12, 0), 0, 1e-2, "triton")
    assert len(set(forgotten)) == 2
