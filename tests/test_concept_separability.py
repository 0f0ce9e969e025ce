"""Separability of concepts: of the features of an SAE and of coordinates, as their histograms say, and far above chance where
the concepts differ."""

from __future__ import annotations

import pytest
import torch

from saelab.features.separability import js_distance
from saelab.saes import ReLUConfig, ReLUSAE
from saelab.steering import concept_separability
from saelab.steering.concept_separability import UnitScores
from saelab.steering.text_activations import stream_tokens

HOOK = "blocks.1.hook_resid_post"
CONCEPTS = {
    "houses": ["The house on the hill was sold.", "The old mill and the house.", "The man sold the red house."],
    "code": ["def main(argument): return argument + 1", "return function(argument) # end", "x = [1, 2]; y = {4: 5}"],
    "talk": ["She said that the man came to pass.", "He said: come to the house!", "They said that it is fine."],
}


@pytest.fixture(scope="module")
def sae() -> ReLUSAE:
    made = ReLUSAE(ReLUConfig(64, normalize="none"), 32, 3).requires_grad_(False)
    made.b_enc.data.copy_(torch.linspace(-1.5, 0.5, 64))
    return made


@pytest.fixture(scope="module")
def found(sae, tiny_lm):
    return concept_separability(sae, tiny_lm, CONCEPTS, hook_name=HOOK)


def pair_mean(columns: list[torch.Tensor]) -> float:
    """The score of one unit, whose values on the tokens of each concept are given."""
    every = torch.cat(columns).double()
    on = every[every != 0].sort().values
    edge = round(0.001 * (len(on) - 1))
    low, high = on[edge], on[len(on) - 1 - edge]
    shares = []
    for column in columns:
        share = torch.zeros(65).double()
        for value in column.double():
            share[0 if value == 0 else 1 + min(max(int((value - low) / (high - low) * 64), 0), 63)] += 1 / len(column)
        shares.append(share[None])
    pairs = [js_distance(shares[a], shares[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    return float(torch.cat(pairs).mean())


def test_scores_are_those_of_the_histograms(sae, tiny_lm, found):
    x = [
        torch.cat([tokens.x[HOOK].float() for tokens in stream_tokens(tiny_lm, texts, [HOOK])])
        for texts in CONCEPTS.values()
    ]
    acts = [sae.encode(one).to_dense() for one in x]
    assert list(found.n_tokens.values()) == [len(one) for one in x]
    for unit in (0, 13, 31):
        assert float(found.coordinates.scores[unit]) == pytest.approx(pair_mean([one[:, unit] for one in x]))
    fires = [unit for unit in range(64) if sum(int((one[:, unit] != 0).sum()) for one in acts) > 9][:3]
    assert len(fires) == 3
    for unit in fires:
        assert float(found.features.scores[unit]) == pytest.approx(pair_mean([one[:, unit] for one in acts]))


def test_the_top_is_the_mean_of_the_most_separable():
    scores = UnitScores(torch.tensor([0.1, 0.9, 0.5, 0.3]), torch.tensor([0.2, 0.0, 0.4, 0.0]))
    assert scores.top(2) == pytest.approx(0.7) and scores.top() == scores.top(99) == pytest.approx(0.45)
    assert scores.top_chance(1) == pytest.approx(0.4) and scores.top_chance() == pytest.approx(0.15)


def test_equal_concepts_are_not_separable(sae, tiny_lm):
    same = concept_separability(sae, tiny_lm, {"a": CONCEPTS["talk"], "b": CONCEPTS["talk"]}, hook_name=HOOK)
    assert same.features.top() == same.coordinates.top() == 0


def test_chance_is_the_score_of_shuffled_texts(sae, tiny_lm, found):
    texts = [text for of in CONCEPTS.values() for text in of]
    owners = torch.arange(3).repeat_interleave(3)[torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    mixed = {str(k): [text for text, owner in zip(texts, owners, strict=True) if owner == k] for k in range(3)}
    assert sorted(map(sorted, mixed.values())) != sorted(map(sorted, CONCEPTS.values()))
    again = concept_separability(sae, tiny_lm, mixed, hook_name=HOOK)
    torch.testing.assert_close(found.features.chance, again.features.scores)
    torch.testing.assert_close(found.coordinates.chance, again.coordinates.scores)
    other = concept_separability(sae, tiny_lm, CONCEPTS, hook_name=HOOK, seed=1)
    assert torch.equal(other.features.scores, found.features.scores)
    assert not torch.equal(other.features.chance, found.features.chance)


def test_what_is_refused(sae, tiny_lm):
    with pytest.raises(ValueError, match=r"concepts=\['one'\]; give at least two"):
        concept_separability(sae, tiny_lm, {"one": ["a text"]}, hook_name=HOOK)
    with pytest.raises(ValueError, match="concept 'empty' has no counted token"):
        concept_separability(sae, tiny_lm, {"empty": ["x"], "talk": CONCEPTS["talk"]}, hook_name=HOOK)
    with pytest.raises(ValueError, match="pass hook_name"):
        concept_separability(sae, tiny_lm, CONCEPTS)
