"""Attenuation: no-ops keep every bit, the ends are nothing and the mask, and posteriors are Bayes' rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from saelab.errors import SaelabError
from saelab.models import Steering
from saelab.saes import SAE, CrosscoderConfig, CrosscoderSAE, ReLUConfig, ReLUSAE
from saelab.steering import Attenuation, FeatureHandle, attenuate
from saelab.steering.attenuate import Posterior, _Firings, _fitted

HOOK = "blocks.1.hook_resid_post"
CONCEPT = [
    "The river runs past the old mill.",
    "The house on the hill was sold.",
    "She said that the man came to pass.",
]
OTHERS = ["def main(argument): return argument + 1", "x = [1, 2, 3]; y = {4: 5}", "return function(argument) # end"]
TEXT = "The weather today is fine, and def main(): return 1"


@pytest.fixture(scope="module", params=["none", "layer_norm"])
def sae(request, tiny_lm) -> SAE:
    (x,) = next(iter(tiny_lm.stream_activations([TEXT], [HOOK])))[HOOK]
    made = ReLUSAE(
        ReLUConfig(64, normalize="layer_norm" if request.param == "layer_norm" else "center_and_scale"), 32, 3
    )
    made.set_normalization(x[1:].mean(0), float(x[1:].square().sum(1).mean()))
    made.b_enc.data.copy_(torch.linspace(-1.5, 0.5, 64))
    made.provenance = replace(made.provenance, origin={"hook_name": HOOK})
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def edit(sae, tiny_lm) -> Attenuation:
    return attenuate(sae, tiny_lm, CONCEPT, OTHERS, 4)


def activations(lm, *edits):
    with lm.steer(*edits):
        return next(iter(lm.stream_activations([TEXT], [HOOK])))[HOOK].clone()


def gaussians(*rows) -> Posterior:
    return Posterior(*torch.tensor(rows).double().T)


# --- the edit


@pytest.mark.parametrize("change", [{"strength": 0.0}, {"prior": 0.0}, {"strength": 0.0, "how": "mask"}])
def test_no_ops_leave_every_bit(tiny_lm, edit, change):
    assert torch.equal(tiny_lm.run_with_edit(TEXT, replace(edit, **change)), tiny_lm.logits(TEXT))
    x, positions = torch.randn(1, 4, 32), torch.tensor([[0, 1, 2, -1]])
    assert replace(edit, **change).apply(x, positions) is x
    assert edit.apply(x, torch.tensor([[0, -1, -1, -1]])) is x


def test_a_certain_concept_is_masked(tiny_lm, edit):
    masked, plain = activations(tiny_lm, replace(edit, how="mask")), activations(tiny_lm)
    assert not torch.equal(masked, plain)
    assert torch.equal(masked[0, 0], plain[0, 0])  # position 0
    assert torch.equal(activations(tiny_lm, replace(edit, prior=1.0)), masked)
    ablations = [FeatureHandle(edit.sae, feature).ablate() for feature in edit.features]
    torch.testing.assert_close(activations(tiny_lm, *ablations), masked, rtol=1e-4, atol=1e-4)


def test_it_is_monotone_and_linear_in_strength(tiny_lm, edit):
    plain, full = activations(tiny_lm), activations(tiny_lm, edit)
    assert not torch.equal(plain, full)
    for strength in (0.25, 0.5, 0.75):
        part = activations(tiny_lm, edit * strength)
        torch.testing.assert_close(part - plain, strength * (full - plain), rtol=1e-3, atol=1e-5)
    masked = activations(tiny_lm, replace(edit, how="mask"))
    assert (full - plain).norm() < (masked - plain).norm()


def test_it_is_features_of_the_concept(sae, tiny_lm, edit):
    def means(texts):
        rows = [next(iter(tiny_lm.stream_activations([text], [HOOK])))[HOOK][0, 1:].clone() for text in texts]
        return sae.encode(torch.cat(rows)).to_dense().mean(0)

    more = means(CONCEPT) > means(OTHERS)
    assert len(edit.features) == 4 and all(bool(more[i]) for i in edit.features)
    assert list(edit.distances) == sorted(edit.distances, reverse=True) and 0 < edit.distances[0] <= 1
    assert attenuate(sae, tiny_lm, CONCEPT, OTHERS, 64).features[:4] == edit.features
    assert edit.d_in == 32 and "4 features" in repr(edit)


def test_the_range_is_two_and_a_half_standard_deviations(edit):
    n = len(edit.features)
    ranged = replace(edit, how="range", strength=0.5, posterior=gaussians(*[(10, 2, 0, 1, 0, -99, 99)] * n))
    acts = torch.tensor([4.9, 5.1, 10.0, 14.9, 15.1])[:, None].expand(-1, n).float()
    assert ranged.suppressed(acts)[:, 0].tolist() == [0, 0.5, 0.5, 0.5, 0]


# --- the posterior


def test_two_gaussians_cross_at_one_half():
    """N(0, 1) and N(3, 2) have equal densities at the roots of 3 a^2 + 6 a - 9 - 8 log 2 = 0."""
    crossing = (-6 + math.sqrt(36 + 12 * (9 + 8 * math.log(2)))) / 6
    posterior = gaussians((3, 2, 0, 1, 0, -99, 99))
    at = posterior.probability(torch.tensor([[crossing], [crossing - 0.5], [crossing + 0.5]]).double(), 0.5)
    assert float(at[0]) == pytest.approx(0.5) and float(at[1]) < 0.5 < float(at[2])
    same = gaussians((3, 2, 3, 2, 0, -99, 99), (3, 2, 3, 2, math.log(4), -99, 99))
    for prior in (0.0, 0.2, 0.5, 1.0):
        found = same.probability(torch.full((1, 2), 4.0), prior)[0].tolist()
        assert found == pytest.approx([prior, 4 * prior / (4 * prior + 1 - prior)])


def test_beyond_what_was_seen_the_nearest_seen_counts():
    posterior = gaussians((5, 1, 1, 3, 0, 0.5, 7))
    far, edge = posterior.probability(torch.tensor([[50.0], [7.0]]).double(), 0.5)
    assert float(far) == float(edge) > 0.5


def test_it_is_fitted_to_the_activations_of_each_set():
    generator = torch.Generator().manual_seed(0)
    concept, other = 6 + torch.randn(4000, generator=generator), 2 + 0.5 * torch.randn(2000, generator=generator)
    values = torch.cat([concept, other])
    flags = torch.arange(6000) < 4000
    fitted = _fitted(_Firings(values, torch.full((6000,), 3), flags, (8000, 8000)), [3])
    found = [float(one) for one in fitted]
    assert found == pytest.approx([6, 1, 2, 0.5, math.log(2), float(values.min()), float(values.max())], abs=0.05)
    silent = _fitted(_Firings(concept, torch.full((4000,), 3), torch.ones(4000).bool(), (8000, 8000)), [3])
    assert float(silent.probability(torch.tensor([[6.0]]), 0.5)) > 0.999  # never fired on others


# --- bad input


def test_a_feature_is_suppressed_once(sae, tiny_lm, edit):
    """As two edits that set one feature are refused; one beside it that adds, or sets another feature, is not."""
    mine, free = FeatureHandle(sae, edit.features[0]), next(i for i in range(64) if i not in edit.features)
    for other in (
        replace(edit, strength=0.5),
        replace(edit, features=edit.features[1:]),
        mine.ablate(),
        mine.scale(0.5),
    ):
        with pytest.raises(ValueError, match="both set the same activation"):
            Steering([edit, other])
        with pytest.raises(ValueError, match="both set the same activation"), tiny_lm.steer(other), tiny_lm.steer(edit):
            pass
    Steering([edit, mine.add(1.0, unit="raw"), FeatureHandle(sae, free).ablate()])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strength": 1.5}, "strength=1.5 must be between 0 and 1"),
        ({"prior": -0.1}, "prior=-0.1 must be between 0 and 1"),
        ({"strength": math.nan}, "strength nan is not finite"),
        ({"prior": math.inf}, "prior inf is not finite"),
        ({"prior": True}, "prior True is not a number"),
        ({"n_features": True}, "n_features=True must be a whole number"),
        ({"how": "zero"}, "how='zero' is unknown; expected one of posterior, mask, range"),
        ({"n_features": 0}, "n_features=0"),
        ({"n_features": 65}, "n_features=65"),
        ({"concept": []}, "concept holds no text"),
        ({"others": ["x"]}, "others holds 1 texts and no counted token"),
        ({"hook_name": "blocks.9.hook_resid_post"}, "does not exist"),
    ],
)
def test_what_is_refused(sae, tiny_lm, change, said):
    with pytest.raises(ValueError, match=said):
        attenuate(sae, tiny_lm, **({"concept": CONCEPT, "others": OTHERS} | change))


def test_what_no_edit_can_compute_is_refused(sae, tiny_lm):
    with pytest.raises(SaelabError, match="No feature is more active"):
        attenuate(sae, tiny_lm, CONCEPT, CONCEPT)
    two = CrosscoderSAE(CrosscoderConfig(32, k=4), d_in=32, n_sources=2)
    two.provenance = replace(two.provenance, origin={"hook_names": [HOOK, "blocks.2.hook_resid_post"]})
    with pytest.raises(ValueError, match="cannot compute from blocks.2.hook_resid_post"):
        attenuate(two, tiny_lm, CONCEPT, OTHERS)
    with pytest.raises(ValueError, match="pass hook_name"):
        attenuate(ReLUSAE(ReLUConfig(64), 32), tiny_lm, CONCEPT, OTHERS)
