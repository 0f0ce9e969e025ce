"""What the calls that read texts take: texts or their token ids, the same for both, and no model that is being steered."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from saelab.saes import ReLUConfig, ReLUSAE
from saelab.steering import Direction, attenuate, diff_means, features_for, lineas, pca_pairs, probe
from saelab.steering.text_activations import distinct_texts, text_list

HOOK = "blocks.1.hook_resid_post"
POS = [
    f"The {one} on the hill was sold and then it rained again."
    for one in ("mill", "hat", "house", "tree", "dog", "cow", "man", "red", "day", "sea")
]
NEG = [
    f"def {one}(argument): return argument + 1"
    for one in ("a", "be", "see", "do", "eat", "if", "go", "hat", "it", "jam")
]


@pytest.fixture(scope="module")
def sae(tiny_lm):
    (x,) = next(iter(tiny_lm.stream_activations([POS[0]], [HOOK])))[HOOK]
    made = ReLUSAE(ReLUConfig(64), 32, 3)
    made.set_normalization(x[1:].mean(0), float(x[1:].square().sum(1).mean()))
    made.provenance = replace(made.provenance, origin={"hook_name": HOOK})
    return made.requires_grad_(False)


CALLS = {
    "diff_means": lambda sae, lm, pos, neg: diff_means(lm, pos, neg, HOOK).vector,
    "pca_pairs": lambda sae, lm, pos, neg: pca_pairs(lm, pos, neg, HOOK).vector,
    "probe": lambda sae, lm, pos, neg: probe(lm, pos, neg, HOOK).vector,
    "features_for": lambda sae, lm, pos, neg: torch.tensor(features_for(sae, lm, pos, neg, 5)),
    "attenuate": lambda sae, lm, pos, neg: torch.tensor(attenuate(sae, lm, pos, neg, 5).features),
    "lineas": lambda sae, lm, pos, neg: lineas(lm, pos, neg, HOOK, steps=2, progress=False).maps[0].weight,
}


@pytest.mark.parametrize("name", CALLS)
def test_token_ids_are_read_as_their_texts(tiny_lm, sae, name):
    """Lists, arrays and tensors of ids, repeated ones too; special tokens are among them as they are before a text."""
    call = CALLS[name]
    wanted = call(sae, tiny_lm, POS, NEG)
    pos, neg = ([tiny_lm.to_ids(text)[0] for text in texts] for texts in (POS, NEG))
    for kind in (lambda row: row.tolist(), lambda row: tuple(row.tolist()), lambda row: row.numpy(), lambda row: row):
        assert torch.equal(call(sae, tiny_lm, [*map(kind, pos)], [*map(kind, neg)]), wanted)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_neither_text_nor_ids_is_refused_by_name(tiny_lm, sae, name):
    for wrong in (3.5, None, {"input_ids": [1, 2]}, ["a text"], [1.5], torch.tensor([0.5])):
        said = re.escape(repr(wrong))
        with pytest.raises(
            ValueError, match=f"(pos|positive|concept|source) holds {said}, which is neither a text nor"
        ):
            CALLS[name](sae, tiny_lm, [*POS, wrong], NEG)


@pytest.mark.parametrize("name", CALLS)
def test_a_steered_model_is_refused(tiny_lm, sae, name):
    """It would be read silently as if nothing steered it."""
    with (
        tiny_lm.steer(Direction(torch.ones(32), "blocks.0.hook_resid_post") * 3.0),
        pytest.raises(ValueError, match="The model is being steered by <raw 3 of a direction"),
    ):
        CALLS[name](sae, tiny_lm, POS, NEG)


def test_the_ids_of_one_text_are_one_text(tiny_lm):
    """However many there are: they are no list of texts to be read in batches."""
    ids = tiny_lm.to_ids(" ".join(POS[:2]))[0].tolist()
    assert len(ids) > 16 and text_list(ids, "pos") == [ids]
    for given in (ids, torch.tensor(ids), torch.tensor([ids])):
        found = diff_means(tiny_lm, given, NEG, HOOK).vector
        assert torch.equal(found, diff_means(tiny_lm, [" ".join(POS[:2])], NEG, HOOK).vector)
    assert len(text_list(torch.tensor([ids, ids]), "pos")) == 2


def test_a_text_counts_once_whatever_holds_its_ids():
    assert distinct_texts(["a", "b", "a"], "pos") == ["a", "b"]
    found = distinct_texts([[1, 2], torch.tensor([1, 2]), (3,), [2, 1]], "pos")
    assert [list(map(int, one)) for one in found] == [[1, 2], [3], [2, 1]]
