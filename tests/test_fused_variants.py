"""The fused steps of TopK SAEs that rank by magnitude or by decoder norm: those of autograd, and they never wait."""

import pytest
import torch
from fused_cases import (
    DEVICE,
    an_sae,
    batch,
    compare,
    fused_training,
    general_acts,
    nan_step,
    one_step,
    replaced,
    run_of,
)

from saelab.kernels.triton_backend.step import candidates
from saelab.saes import AbsTopKConfig, TopKConfig
from saelab.training import fused_step, steps

BY_NORM, MAGNITUDE = TopKConfig(d_sae=20, k=3, score="decoder_norm"), AbsTopKConfig(d_sae=20, k=3)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # numpy runs the kernels, also on memory never written
BOTH = pytest.mark.parametrize("config", [BY_NORM, MAGNITUDE], ids=["decoder_norm", "magnitude"])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The sizes of these tests would all be dense."""
    monkeypatch.setattr(fused_step, "dense_pays", lambda d_sae, k: False)
    monkeypatch.setattr(fused_step, "HORIZON", 2)
    monkeypatch.setattr(steps, "LAG", 1)


def longer_rows(sae):
    """Decoder rows of norms from 0.1 to 5, which a step brings back to 1; their order matters before."""
    sae.W_dec.data *= torch.linspace(0.1, 5, sae.d_sae, device=DEVICE)[:, None]


def equal_features(sae):
    sae.W_enc.data[10:16], sae.b_enc.data[10:16] = sae.W_enc.data[0].clone(), sae.b_enc.data[0].clone()
    sae.W_dec.data[10:16] = sae.W_dec.data[0].clone()


def opposite_features(sae):
    sae.W_enc.data[10:16], sae.b_enc.data[10:16] = -sae.W_enc.data[0], -sae.b_enc.data[0]
    sae.W_dec.data[10:16] = sae.W_dec.data[0].clone()


def negative(sae):
    sae.b_enc.data.fill_(-50.0)


def no_candidates(monkeypatch):
    monkeypatch.setattr(candidates, "MARGIN", -1000.0)


def few_slots(monkeypatch):
    monkeypatch.setattr(candidates, "slots_for", lambda k: 4)
    monkeypatch.setattr(candidates, "MARGIN", 500.0)


def by_dense_products(monkeypatch):
    monkeypatch.setattr(fused_step, "dense_pays", lambda d_sae, k: True)


CASES = {
    "plain": (None, None, {"n_steps": 3}),
    "no candidates": (no_candidates, None, {}),
    "too few slots": (few_slots, None, {}),
    "equal features": (None, equal_features, {"exact": False}),
    "opposite features": (None, opposite_features, {"exact": False}),
    "negative": (None, negative, {}),
    "dense": (by_dense_products, None, {"rtol": 1e-2}),
    "odd sizes": (None, None, {"n_rows": 5, "d_in": 33}),
}


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_step_of_autograd(monkeypatch, config, case):
    patch, change, options = CASES[case]
    if patch is not None:
        patch(monkeypatch)
    fused = compare(config, change=change, **options)
    if case in ("no candidates", "too few slots"):
        assert fused.selection()["recomputed"] > 0, "the search through all features was not needed"


@pytest.mark.parametrize("patch", [lambda monkeypatch: None, no_candidates], ids=["candidates", "search"])
def test_decoder_norms_decide(monkeypatch, patch):
    patch(monkeypatch)
    sae, x = an_sae(BY_NORM, 12), batch(6, 12, 0)
    longer_rows(sae)
    training = fused_training(run_of(sae, 6, 40))
    want = general_acts(run_of(sae, 6, 40), x, 0).to_dense()
    one_step(training, x, 0, 1e-2, "triton")
    assert torch.equal(training.fused.feature_acts().to_dense() != 0, want != 0)


def test_signs_are_kept():
    fused = compare(MAGNITUDE, change=negative)
    assert fused.fused.feature_acts().values.max() < 0


@BOTH
def test_dead_features_are_helped(config):
    compare(replaced(config, k_aux=3), n_dead=7, n_steps=2)


@BOTH
def test_nan_changes_no_weight(config):
    nan_step(config)


def test_a_pair_of_each_sign_is_bounded():
    """The k largest magnitudes are candidates, though the product bounds values: their bounds decide, without a search."""
    sae = an_sae(MAGNITUDE, 12)
    with torch.no_grad():
        sae.W_enc[:10] *= -3.0
    fused = compare(MAGNITUDE, change=lambda other: other.load_state_dict(sae.state_dict()))
    assert fused.selection()["recomputed"] == 0
