"""What the experiments on concepts compute themselves: the loss of texts, maps fitted hook by hook, and costs at equal effect."""

from __future__ import annotations

import pytest
import torch

from saelab.claims.concept_texts import mean_nll, others_of, passages
from saelab.claims.experiments.lineas import HOOKS, _cost, _distance, _matching, _one_by_one, _shift, _unchanged
from saelab.steering import AffineEdit
from saelab.steering.text_activations import text_vectors

TEXTS = ["The house on the hill was sold.", "She said that the man came to pass. He did."]
OTHERS = ["def main(argument): return 1", "x = [1, 2, 3]; y = {4: 5}"]
HOOK = "blocks.1.hook_resid_post"


def test_the_loss_is_that_of_the_tokens(tiny_lm):
    total, n = 0.0, 0
    for text in TEXTS:
        ids = tiny_lm.to_ids(text).flatten()
        log_probs = tiny_lm.logits(text)[0].double().log_softmax(-1)
        total -= sum(float(log_probs[i - 1, ids[i]]) for i in range(1, len(ids)))
        n += len(ids) - 1
    assert mean_nll(tiny_lm, TEXTS) == pytest.approx(total / n, rel=1e-5)
    edit = AffineEdit(HOOK, torch.full((32,), -0.9), torch.zeros(32))
    assert mean_nll(tiny_lm, TEXTS, [edit]) != pytest.approx(total / n, rel=1e-3)
    assert not tiny_lm.edits


def test_passages_are_of_their_kind_and_of_others():
    texts = passages(30, 80)
    assert set(texts) == {"bible_kjv", "chat", "python_code", "python_docs", "shakespeare", "wordnet"}
    assert all(len(set(of)) == 30 and max(map(len, of)) <= 80 for of in texts.values())
    assert passages(30, 80) == texts != passages(30, 80, seed=1)
    others = others_of("chat", texts, 12)
    owners = [kind for one in others for kind, of in texts.items() if one in of]
    assert len(owners) == 12 and "chat" not in owners and set(map(owners.count, owners)) == {2, 3}


def test_a_map_of_one_hook_has_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(20, 3, generator=generator).double(), 3 + 2 * torch.randn(20, 3, generator=generator).double()
    weight, bias = _matching(u, v)
    a, b = u.sort(0).values, v.sort(0).values
    for i in range(3):
        wanted = torch.linalg.lstsq(torch.stack([a[:, i], torch.ones(20).double()], 1), b[:, i, None]).solution[:, 0]
        torch.testing.assert_close(torch.stack([weight[i] + 1, bias[i]]), wanted)
    torch.testing.assert_close(_shift(u, v)[1], v.mean(0) - u.mean(0))
    assert not bool(_shift(u, v)[0].any())


def test_later_maps_are_fitted_under_the_earlier_ones(tiny_lm, monkeypatch):
    monkeypatch.setattr("saelab.claims.experiments.lineas.HOOKS", ("blocks.0.hook_resid_post", HOOK))
    edits = _one_by_one(tiny_lm, TEXTS, OTHERS, _shift)
    with tiny_lm.steer(*edits):
        means = [text_vectors(tiny_lm, TEXTS, one.hook_name, "texts").mean(0) for one in edits]
    for one, mean in zip(edits, means, strict=True):
        wanted = text_vectors(tiny_lm, OTHERS, one.hook_name, "others").mean(0)
        torch.testing.assert_close(mean, wanted, atol=1e-4, rtol=1e-3)
    assert _distance(tiny_lm, TEXTS, OTHERS, []) == 1 > _distance(tiny_lm, TEXTS, OTHERS, edits)
    assert len(HOOKS) == 3 and _unchanged(edits) == 0
    edits[0].bias[:8] = 0
    assert _unchanged(edits) == 1 / 8


def test_the_cost_lies_between_those_of_the_strengths_around():
    curve = [(0.0, 0.0), (1.0, 0.1), (3.0, 0.5), (2.0, 0.9)]
    assert [_cost(curve, effect) for effect in (0, 0.5, 2, 3)] == pytest.approx([0, 0.05, 0.3, 0.5])
    assert _cost([(0.0, 0.0), (-1.0, 0.2)], 0.0) == 0
