"""Rows that are NaN, infinite, constant or zero: an error that names the place, never a token without features or FVU 0."""

import numpy as np
import pytest
import torch
from tiny_saes import build, config_of, rows

from saelab.errors import TrainingError
from saelab.evaluation.crosscoder import latent_scaling
from saelab.saes import VARIANTS, Batch, CrosscoderConfig, CrosscoderSAE, MatchingPursuitConfig, MatchingPursuitSAE
from saelab.saes.provenance import Provenance
from saelab.training import TrainConfig, train

TRAIN = TrainConfig(n_tokens=32 * 6, batch_size=32, device="cpu")
NORMALIZE = ("center_and_scale", "scale", "none")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_variant_encodes_rows_that_are_not_finite(name, value):
    sae, x = build(name), rows(20)
    sae.provenance = Provenance(origin={"hook_name": "blocks.1.hook_resid_post"})
    x[[3, 11], 5] = value
    for call in (sae, sae.encode):
        with pytest.raises(ValueError, match=r"2 of 20 activations of blocks.1.hook_resid_post .* first is row 3"):
            call(x)


def test_rows_too_large_for_the_weights_dtype_are_named():
    sae = build("topk", normalize="none")
    with pytest.raises(ValueError, match="too large for torch.float32"):
        sae.encode(torch.full((4, 12), 1e300, dtype=torch.float64))


def sources(x):
    return torch.stack([rows(len(x)), x], 1)


MAKE = {
    "tensor": lambda x: ("topk", x),
    "array": lambda x: ("relu", x.numpy()),
    "iterator": lambda x: ("batch_topk", iter([x, rows(200)])),
    "y of a transcoder": lambda x: ("transcoder", Batch(rows(len(x)), x)),
    "x of a transcoder": lambda x: ("transcoder", Batch(x, rows(len(x)))),
    "source of a crosscoder": lambda x: ("crosscoder", sources(x)),
}


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("constant", [0.0, 1e-3, 3.0, 1e5])
@pytest.mark.parametrize("kind", MAKE)
def test_rows_that_are_all_the_same_are_not_trained_on(kind, constant, normalize):
    name, data = MAKE[kind](torch.full((100, 12), constant) * torch.linspace(0.5, 1.7, 12))
    says = "are all zero" if constant == 0 else "are all the same"
    with pytest.raises(ValueError, match=f"'[xy]'{' of source 1' if 'source' in kind else ''} to train on {says}"):
        train(config_of(name, normalize=normalize), data, TRAIN, progress=False)


@pytest.mark.parametrize("offset", [0.0, 10.0, 300.0])
def test_rows_that_vary_about_a_large_mean_are_trained_on(offset):
    x = rows(200) + offset
    assert train(config_of("topk"), x, TRAIN, progress=False).scale.item() == pytest.approx(1 / 3, rel=0.2)


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        (
            rows(64).index_fill(0, torch.tensor([40]), torch.nan),
            r"1 of 32 activations in batch 3 .*'x', the first is row 8",
        ),
        (torch.full((64, 12), 3.0), "all activations 'x' in batch 2 are the same"),
    ],
    ids=["nan", "constant"],
)
def test_bad_rows_on_the_way_stop_a_training_and_are_named(chunk, says):
    with pytest.raises(TrainingError, match=says):
        train(config_of("topk"), iter([rows(64), chunk, rows(64)]), TRAIN, progress=False)


def test_every_kind_of_data_is_looked_at_before_training():
    x = rows(64)
    x[7, 0] = torch.nan
    for data in (x, np.asarray(x), iter([x]), Batch(x, rows(64)), Batch(rows(64), x)):
        with pytest.raises(ValueError, match="1 of 64 rows contain NaN or infinite values"):
            train(config_of("transcoder" if isinstance(data, Batch) else "topk"), data, TRAIN, progress=False)


def test_every_other_way_to_encode_names_bad_rows(bad=float("nan")):
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    x[3, 2] = bad
    pursuit = MatchingPursuitSAE(MatchingPursuitConfig(32, 3), 12)
    with pytest.raises(ValueError, match="first is row 3"):
        pursuit.encode_in_steps(x, 4)
    crosscoder = CrosscoderSAE(CrosscoderConfig(32, 3, sparsity="l1"), 12, n_sources=2)
    pairs = torch.randn(8, *crosscoder.center.shape, generator=torch.Generator().manual_seed(0))
    pairs[5, 0, 0] = bad
    with pytest.raises(ValueError, match="first is row 5"):
        latent_scaling(crosscoder, [pairs])
    pairs[5, 0, 0] = 0.0
    ours, theirs = latent_scaling(crosscoder, [pairs.numpy()]), latent_scaling(crosscoder, [pairs])
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(ours, theirs, strict=True))
