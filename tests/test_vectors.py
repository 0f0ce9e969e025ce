"""Directions of paired texts: the first component is that of the differences, and points to `pos`."""

import pytest
import torch

from saelab.steering import Direction, diff_means, pca_pairs

HOOK = "blocks.1.hook_resid_post"
POS = ["The weather today is fine.", "The house on the hill", "It came to pass", "She said that"]
NEG = ["The weather tonight is bad.", "A mouse in the mill", "They go to work", "He read this"]


def vectors(lm, texts, last=False):
    found = (next(iter(lm.stream_activations([text], [HOOK])))[HOOK][0, 1:].double() for text in texts)
    return torch.stack([x[-1] if last else x.mean(0) for x in found])


@pytest.mark.parametrize("tokens", ["mean", "last"])
def test_it_is_the_first_component_of_the_differences(tiny_lm, tokens):
    differences = vectors(tiny_lm, POS, tokens == "last") - vectors(tiny_lm, NEG, tokens == "last")
    direction = pca_pairs(tiny_lm, POS, NEG, HOOK, tokens=tokens)
    unit = direction.vector.double() / direction.vector.double().norm()
    largest, along = torch.linalg.eigvalsh(differences.T @ differences)[-1], differences @ unit
    torch.testing.assert_close(along.square().sum(), largest)
    assert float(direction.vector.norm()) == pytest.approx(float((largest / len(POS)).sqrt()), rel=1e-5)
    assert along.mean() > 0 and type(direction) is Direction
    turned = pca_pairs(tiny_lm, NEG, POS, HOOK, tokens=tokens)
    torch.testing.assert_close(turned.vector, -direction.vector)


def test_one_pair_is_its_difference(tiny_lm):
    direction = pca_pairs(tiny_lm, POS[:1], NEG[:1], HOOK)
    torch.testing.assert_close(direction.vector, diff_means(tiny_lm, POS[:1], NEG[:1], HOOK).vector)


@pytest.mark.parametrize(
    ("pos", "neg", "options", "said"),
    [
        (POS, NEG[:3], {}, "pos has 4 texts and neg has 3"),
        (POS, POS, {}, "same activations"),
        ([], [], {}, "pos holds no text"),
        (POS[:2], ["fine words", "x"], {}, r"neg\[1\] has no token"),
        (POS, NEG, {"tokens": "first"}, "tokens='first' is unknown"),
        ({"text": POS}, NEG, {}, "pos is a dict"),
    ],
)
def test_what_is_refused(tiny_lm, pos, neg, options, said):
    with pytest.raises(ValueError, match=said):
        pca_pairs(tiny_lm, pos, neg, HOOK, **options)
    with pytest.raises(ValueError, match="does not exist"):
        pca_pairs(tiny_lm, POS, NEG, "blocks.9.hook_resid_post")
