"""Features of a concept: a planted one comes first, and its held-out scores are those of the half it was not chosen on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saelab.saes import SAE, AbsTopKConfig, AbsTopKSAE, TopKConfig, TopKSAE
from saelab.steering import features_for, probe
from saelab.steering.concept_features import auroc, text_maxima

HOOK = "blocks.1.hook_resid_post"
A, B = ["river", "mill", "house", "hill", "man", "hat"], ["word", "light", "end", "day"]
POS = [f"The {a} and the {b} are here!" for a in A for b in B]
NEG = [f"def {a}({b}): return {b}" for a in A for b in B]
PLANTED = 17


@pytest.fixture(scope="module")
def sae(tiny_lm) -> SAE:
    """Random features, and one whose encoder row is a probe for the concept."""
    made = TopKSAE(TopKConfig(64, k=8, normalize="none"), d_in=32, seed=3).requires_grad_(False)
    found = probe(tiny_lm, POS, NEG, HOOK)
    size = float(found.vector.norm())
    made.W_enc[PLANTED], made.b_enc[PLANTED] = 30 * found.vector / size, 30 * found.bias / size
    made.provenance = replace(made.provenance, origin={"hook_name": HOOK})
    return made


@pytest.mark.parametrize("by", ["difference", "auroc"])
def test_the_planted_feature_comes_first(sae, tiny_lm, by):
    rows = features_for(sae, tiny_lm, POS, NEG, 5, by=by)
    assert rows[0].feature == PLANTED and len(rows) == 5
    scores = [row.selected_by for row in rows]
    assert scores == sorted(scores, reverse=True)
    for row in rows:
        assert row.low <= row.difference <= row.high and row.auroc_low <= row.auroc <= row.auroc_high
        assert row.difference == pytest.approx(row.share_positive - row.share_negative)
        assert (row.n_positive, row.n_negative) == (12, 12)
    assert rows[0].auroc > 0.8
    assert rows == features_for(sae, tiny_lm, [*POS, POS[3]], NEG, 5, by=by)  # a text counts once


def test_scores_are_of_the_other_half(sae, tiny_lm):
    """With as many choices as features, chance alone looks good on the half it is chosen on, and not on the other."""
    mixed = POS[::2] + NEG[::2], POS[1::2] + NEG[1::2]
    chosen, held_out = 0.0, 0.0
    for seed in range(6):
        row = features_for(sae, tiny_lm, *mixed, 1, by="auroc", seed=seed)[0]
        chosen, held_out = chosen + row.selected_by / 6, held_out + row.auroc / 6
    assert chosen > 0.65 and held_out < chosen - 0.1


def test_maxima_are_those_of_encode(sae, tiny_lm):
    found = text_maxima(sae, tiny_lm, POS[:3], "positive", None)
    for text, row in zip(POS, found, strict=False):
        (x,) = next(iter(tiny_lm.stream_activations([text], [HOOK])))[HOOK]
        torch.testing.assert_close(row, sae.encode(x[1:].clone()).to_dense().amax(0), rtol=1e-4, atol=1e-4)


def test_a_maximum_is_the_activation_of_largest_size(tiny_lm):
    signed = AbsTopKSAE(AbsTopKConfig(64, k=12), d_in=32, seed=3).requires_grad_(False)
    found = text_maxima(signed, tiny_lm, POS[:3], "positive", HOOK)
    for text, row in zip(POS, found, strict=False):
        (x,) = next(iter(tiny_lm.stream_activations([text], [HOOK])))[HOOK]
        dense = signed.encode(x[1:].clone()).to_dense()
        wanted = dense.gather(0, dense.abs().argmax(0)[None])[0]
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)
        assert bool((row < 0).any()) and bool((row > 0).any())


def test_auroc_counts_pairs():
    a, b = torch.tensor([[1.0], [3.0], [3.0]]), torch.tensor([[0.0], [3.0], [2.0], [4.0]])
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a[:, 0].tolist() for y in b[:, 0].tolist()]
    assert float(auroc(a, b)[0]) == pytest.approx(sum(pairs) / len(pairs))
    assert float(auroc(a, a)[0]) == 0.5 and float(auroc(a + 9, b)[0]) == 1


@pytest.mark.parametrize(
    ("pos", "neg", "options", "said"),
    [
        (POS[:3], NEG, {}, "positive has 3 different texts; features_for needs at least 4"),
        (POS, [*NEG, "x"], {}, "negative has a text without a counted token: 'x'"),
        (POS, NEG, {"k": 0}, "k=0"),
        (POS, NEG, {"by": "mean"}, "by='mean' is unknown"),
        (POS, NEG, {"seed": -1}, "seed=-1"),
        (POS, NEG, {"hook_name": "blocks.9.hook_resid_post"}, "does not exist"),
    ],
)
def test_what_is_refused(sae, tiny_lm, pos, neg, options, said):
    with pytest.raises(ValueError, match=said):
        features_for(sae, tiny_lm, pos, neg, **options)
    with pytest.raises(ValueError, match="features_for needs an SAE"):
        features_for("runs/demo", tiny_lm, pos, neg)
