"""The fused steps of ReLU and JumpReLU: every pair above its threshold, each penalty, and lists that follow L0."""

import pytest
import torch
from fused_cases import (
    DEVICE,
    all_negative,
    an_sae,
    batch,
    by_feature,
    compare,
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

from saelab.saes import JumpReLUConfig, ReLUConfig
from saelab.training import fused_step, fused_threshold, steps

RELU, JUMP = ReLUConfig(d_sae=20), JumpReLUConfig(d_sae=20, bandwidth=0.6, initial_threshold=0.8)
TANH = replaced(JUMP, loss="tanh", sparsity_coefficient=2.0)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # numpy runs the kernels, also on memory never written
BOTH = pytest.mark.parametrize("config", [RELU, TANH], ids=["relu", "jumprelu"])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fused_step, "HORIZON", 2)
    monkeypatch.setattr(steps, "LAG", 1)


def longer_rows(sae):
    sae.W_dec.data *= torch.linspace(0.5, 2, sae.d_sae, device=DEVICE)[:, None]


def nearly_at_threshold(sae):
    """Pre-activations that half precision cannot tell from a threshold: those of one row of the first batch."""
    with torch.no_grad():
        x = sae.normalize(batch(6, 12, 0))[:1]
        x = x if sae.pre_bias is None else x - sae.pre_bias
        theta = getattr(sae, "threshold", torch.zeros(20, device=DEVICE))
        sae.b_enc.copy_(theta - (x @ sae.W_enc.T)[0] + 1e-5 * torch.arange(-10, 10, device=DEVICE) + 5e-6)


def no_room(monkeypatch):
    monkeypatch.setattr(fused_threshold.FusedThreshold, "first_list_room", lambda self: 4)


CASES = {
    "relu": (RELU, None, None, {"n_steps": 2}),
    "relu, pre-bias": (replaced(RELU, pre_bias=True), None, None, {}),
    "relu, longer rows": (RELU, None, longer_rows, {}),
    "relu, target": (replaced(RELU, target_l0=3.0), None, None, {"n_steps": 2}),
    "relu, late in a run": (replaced(RELU, target_l0=3.0), None, None, {"n_steps": 3, "run": 3}),
    "relu, nothing fires": (RELU, None, all_negative, {}),
    "relu, at threshold": (RELU, None, nearly_at_threshold, {}),
    "relu, in parts": (RELU, in_parts, on_every_token, {}),
    "relu, by feature": (RELU, by_feature, None, {}),
    "relu, lists too short": (RELU, no_room, None, {}),
    "relu, odd sizes": (RELU, None, None, {"n_rows": 5, "d_in": 33}),
    "jumprelu": (JUMP, None, None, {"n_steps": 2}),
    "jumprelu, pre-bias": (replaced(JUMP, pre_bias=True), None, None, {}),
    "jumprelu, to input": (replaced(JUMP, ste_to_input=True), None, None, {}),
    "jumprelu, at threshold": (replaced(JUMP, bandwidth=1e-9), None, nearly_at_threshold, {}),
    "jumprelu, square": (replaced(JUMP, loss="l0_target", target_l0=3.0), None, None, {}),
    "jumprelu, nothing fires": (JUMP, None, all_negative, {}),
    "tanh": (TANH, None, longer_rows, {}),
    "tanh, to input": (replaced(TANH, ste_to_input=True), None, None, {}),
    "tanh, dead": (replaced(TANH, pre_act_coefficient=0.1), None, mostly_negative, {"n_dead": 7, "n_steps": 2}),
    "auxk, dead": (replaced(JUMP, revive="auxk", pre_bias=True), None, None, {"n_dead": 7, "n_steps": 2}),
    "none, dead": (JUMP, None, None, {"n_dead": 7}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_step_of_autograd(monkeypatch, case):
    config, patch, change, options = CASES[case]
    if patch is not None:
        patch(monkeypatch)
    fused = compare(config, change=change, **options)
    if case == "jumprelu":
        assert fused.fused.kept.offsets[-1] > fused.fused.feature_acts().nnz, "no pair in the window but below"
    if case == "relu, lists too short":
        assert fused.fused.list_room > 4


@BOTH
def test_nan_changes_no_weight(config):
    nan_step(config)


def test_the_same_bits_after_a_pause_and_with_short_lists(monkeypatch):
    """Features die on the way: the steps that are made again have no room for them, later ones have."""
    monkeypatch.setattr(steps, "LAG", 2)  # two steps are void before the first is known to be
    batches = [batch(6, 12, seed) for seed in range(5)]
    config = replaced(TANH, target_l0=3.0, d_sae=12, pre_act_coefficient=0.1)
    first, resumed = (state_after(config, batches, at, dying=4) for at in (None, 3))
    no_room(monkeypatch)
    short = state_after(config, batches, dying=4)
    assert first["step 4"].numel() == first["step 1"].numel() + 1, "no feature is revived in the last step"
    for name, value in first.items():
        assert torch.equal(value, resumed[name]) and torch.equal(value, short[name]), name


def test_lists_become_shorter_with_l0(monkeypatch):
    monkeypatch.setattr(fused_threshold, "_LEAST_ROOM", 16)
    sae = an_sae(RELU, 12)
    training = fused_training(run_of(sae, 6, 40))
    assert training.fused.list_room == 75
    mostly_negative(sae)
    for step in range(2):
        one_step(training, batch(6, 12, step), step, 0.0, "triton")
    assert 0 < training.fused.kept.offsets[-1] <= training.fused.list_room < 60
