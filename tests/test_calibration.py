"""At the end of training the promised number of features fires on rows that were neither trained nor calibrated on."""

from pathlib import Path

import numpy as np
import pytest
import torch

import saelab
from saelab.activation_cache.reader import ActivationCache
from saelab.kernels.encode_threshold import encode_threshold
from saelab.saes import Batch, BatchTopKConfig, BatchTopKSAE, StepInfo
from saelab.saes.calibration import LOOSER_FACTORS, LOOSER_SHIFTS, level_for
from saelab.saes.zipf import underused
from saelab.training import TrainConfig, kept_out, train
from saelab.training.data import open_data

L0 = 5
TRAIN = TrainConfig(n_tokens=256 * 48, batch_size=256, device="cpu")
PROMISES = {
    "batch_topk": {"k": L0},
    "mutual_choice": {"k": L0},
    "feature_choice": {"k": L0},
    "matryoshka": {"k": L0},
    "crosscoder": {"k": L0},
    "jumprelu": {"target_l0": float(L0)},
}


def planted(n, seed=0):
    """Sparse sums of 48 directions around a mean that is not 0."""
    directions = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, 48, generator=generator) * (torch.rand(n, 48, generator=generator) < 0.1)
    return codes @ directions + 0.5


def config_of(variant, **more):
    return saelab.VARIANTS[variant].Config(d_sae=64, **PROMISES[variant], **more)


@pytest.mark.parametrize("normalize", ["center_and_scale", "scale", "none"])
@pytest.mark.parametrize("variant", PROMISES)
def test_l0_on_fresh_rows(variant, normalize):
    config = config_of(variant, normalize=normalize, **({"initial_threshold": 0.5} if variant == "jumprelu" else {}))
    sae = train(config, planted(64 * 2048), TRAIN, progress=False)
    fresh = planted(8192, seed=7)
    assert sae.encode(fresh).nnz / len(fresh) == pytest.approx(L0, rel=0.02)
    assert sae.provenance.trained["calibration"] == {"n_rows": 8192, "kept_out": True}


def iterator_of(x):
    return iter(x.split(1000))


@pytest.mark.parametrize(
    ("given", "n_rows", "is_kept_out"),
    [
        (lambda x: x, 2048, True),
        (lambda x: x.numpy(), 2048, True),
        (lambda x: x[:4000], 4000, False),
        (iterator_of, 256, False),
        (lambda x: iterator_of(x[: TRAIN.n_tokens]), 256, False),  # ends with the last batch
    ],
    ids=["tensor", "array", "small tensor", "iterator", "iterator that ends"],
)
@pytest.mark.parametrize("variant", ["batch_topk", "feature_choice"])
def test_every_kind_of_data_gives_rows(variant, given, n_rows, is_kept_out):
    sae = train(config_of(variant), given(planted(64 * 512)), TRAIN, progress=False)
    assert sae.provenance.trained["calibration"] == {"n_rows": n_rows, "kept_out": is_kept_out}
    fresh = planted(8192, seed=7)
    assert sae.encode(fresh).nnz / len(fresh) == pytest.approx(L0, rel=0.08)


@pytest.mark.parametrize("variant", ["topk", "abs_topk", "matching_pursuit", "relu", "gated"])
def test_what_selects_exactly_or_is_held_by_its_controller_is_left_as_it_is(variant):
    config = saelab.VARIANTS[variant].Config(d_sae=64)
    sae = train(config, planted(300), TrainConfig(n_tokens=64 * 3, batch_size=64, device="cpu"), progress=False)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    assert not sae.calibrate(planted(300)) and sae.provenance.trained["calibration"] is None
    torch.testing.assert_close(sae.state_dict(), before, rtol=0, atol=0)


HOOK = "blocks.0.hook_resid_post"


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_left_out_of_a_cache_are_in_no_batch_and_all_others_are(shuffle):
    cache = ActivationCache(Path(__file__).with_name("first_version") / "cache")
    n, left = cache.n_rows, 37
    batches = cache.batches(n - left, hook_name=[HOOK], shuffle=shuffle, leave_out=left)
    trained, out = next(batches)[HOOK], cache.left_out(left, [HOOK])[HOOK]
    again = next(batches)[HOOK]
    every = next(cache.batches(n, hook_name=HOOK, shuffle=False))

    def rows(x):
        return sorted(map(tuple, x.tolist()))

    assert len(out) == left and rows(torch.cat([trained, out])) == rows(every)
    assert rows(again) == rows(trained)
    with pytest.raises(ValueError, match="leaves no row"):
        cache.batches(8, hook_name=HOOK, leave_out=n)


def test_rows_left_out_of_tensors_are_in_no_batch_and_x_and_y_stay_together(monkeypatch):
    monkeypatch.setattr(kept_out, "MIN_ROWS", 4)
    x = torch.arange(640.0)[:, None].expand(-1, 3) + torch.arange(3)
    source = open_data(Batch(x, 2 * x), None)
    epoch = next(source.batches(["x", "y"], 600, 0, 0))
    assert source.n_rows == 600 and source.kept_out is not None
    last = source.kept_out(["x", "y"])
    assert sorted(torch.cat([epoch["x"], last["x"]])[:, 0].tolist()) == list(range(640))
    assert last["y"].equal(2 * last["x"]) and epoch["y"].equal(2 * epoch["x"])


@pytest.mark.parametrize(
    ("n", "kept", "by_rules_2"),
    [
        (16_383, 0, 0), (16_384, 1024, 256), (131_072, 8192, 2048), (250_000, 8192, 3906),
        (10**6, 15_625, 15_625), (10**9, 16_384, 16_384),
    ],
)  # fmt: skip
def test_how_many_rows_are_kept_out(n, kept, by_rules_2):
    assert [kept_out.n_kept_out(n, rules) for rules in (1, 2, 3)] == [0, by_rules_2, kept]


@pytest.mark.parametrize(("l0", "level"), [(1.0, 6.5), (1.5, 5.5), (3.5, 1.5), (4.0, 0.01), (9.0, 0.01)])
def test_the_level_is_midway_between_two_pairs(l0, level):
    x = torch.tensor([[8.0, 2, 4, 6], [1, 7, 3, 5]])
    found = level_for(l0, x, lambda rows, least: rows[rows > least], LOOSER_FACTORS)
    assert found == pytest.approx(level)
    assert level_for(l0, x[:0], lambda rows, least: rows[rows > least], LOOSER_SHIFTS) is None


@pytest.mark.parametrize("infinite", [[3], [0, 1, 2, 3, 4], list(range(12))])
def test_features_of_infinite_threshold_are_silent_and_no_candidates(infinite):
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(40, 8, generator=generator), torch.randn(12, 8, generator=generator)
    threshold = torch.full((12,), 0.5).index_fill(0, torch.tensor(infinite), torch.inf)
    expected = np.where((u := (x @ W.T).numpy()) > threshold.numpy(), u, 0.0)
    acts = encode_threshold(x, W, torch.zeros(12), threshold)
    np.testing.assert_allclose(acts.to_dense().numpy(), expected, rtol=1e-5)


def test_the_last_stretch_begins_once_a_step_not_once_a_part():
    sae = BatchTopKSAE(saelab.saes.BatchTopKConfig(8, 2), 4)
    for step, values in ((94, (9.0,)), (95, (1.0, 3.0))):
        for value in values:
            sae.observe(torch.tensor(value), StepInfo(torch.zeros(8, dtype=torch.bool), step, 100))
    assert float(sae.threshold) == 2.0 and int(sae.n_observed) == 2


@pytest.mark.parametrize(
    ("exponent", "shift", "helped"),
    [(1.0, 0.0, [False, False, False, True]), (3.0, 0.0, [False] * 4), (0.0, 0.0, [False, False, True, True])],
)
def test_who_fires_too_seldom_follows_the_law(exponent, shift, helped):
    # 4 features, 1 firing a token: Zipf expects .48, .24, .16, .12 of the tokens, an even law .25 each
    density = torch.tensor([0.5, 0.4, 0.02, 0.011])
    assert underused(density, 100, 100, exponent, shift).tolist() == helped


@pytest.mark.parametrize("rules", [1, 2])
def test_aux_zipf_serves_features_that_died_after_they_fired(rules):
    sae = saelab.saes.TopKSAE(saelab.saes.TopKConfig(4, 1, aux="aux_zipf"), 3)
    assert sae.density is not None
    sae.density.average.fill_(0.2)
    sae.density.steps.fill_(10**6)
    acts = sae.encode(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    dead = torch.tensor([False, True, False, False])
    assert sae.helped(acts, StepInfo(dead, 5, 10, rules=rules)).tolist() == [1] * (rules == 2)


@pytest.mark.parametrize("config, warned", [(BatchTopKConfig(64, 60), True), (BatchTopKConfig(64, 4), False)])
def test_an_l0_that_no_threshold_reaches_is_said(caplog, config, warned):
    """60 of 64 features are not positive on a token."""
    with caplog.at_level("WARNING", "saelab"):
        train(config, planted(4096), TrainConfig(n_tokens=48 * 128, batch_size=128), progress=False)
    said = [record.message for record in caplog.records if "features fire per token" in record.message]
    assert len(said) == warned and (not warned or "the config asks for 60" in said[0])
