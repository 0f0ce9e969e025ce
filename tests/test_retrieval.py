"""Retrieval: hand-made neighbours, k above and below that of the SAE, every baseline against its definition."""

from typing import Any, cast

import pytest
import torch
from tiny_saes import D_IN, D_SAE, build, rows

from saelab.evaluation.retrieval import _measured, compare_retrieval, sparse_embedding


def test_neighbours_by_hand():
    """a and b point the same way, c between, d apart; lengths do not matter, and no item is its own neighbour."""
    x = torch.tensor([[1.0, 0.0], [5.0, 0.1], [1.0, 1.0], [0.0, -2.0]])
    found = _measured("dense", 2, x, torch.tensor([0, 0, 1, 1]))
    # nearest: a -> b, b -> a, c -> b (wrong), d -> a or b, not c (wrong)
    assert found[1:] == pytest.approx((2, 1.5, 0.5, 1 / 3))


def test_an_item_of_zeros_takes_the_first_other():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert _measured("sae", 2, x, torch.tensor([7, 7, 8])).accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["csr", "topk", "abs_topk", "matching_pursuit", "relu"])
def test_k_is_that_asked_for_and_the_sae_is_left_as_it_was(name):
    sae, x = build(name), rows(50)
    few = sparse_embedding(sae, x, 2)
    full = sae.encode(x).to_dense()
    assert int((few != 0).sum(1).max()) <= 2 and torch.equal(few[few != 0], full[few != 0])
    assert bool((few.abs().sum(1) >= full.abs().topk(2, 1).values.sum(1) - 1e-5).all())
    more = (sparse_embedding(sae, x, 9) != 0).sum(1)
    assert int(more.max()) <= 9 and (name not in ("csr", "topk", "abs_topk") or more.tolist() == [9] * 50)
    assert torch.equal(sae.encode(x).to_dense(), full)


def test_baselines_are_what_they_say():
    sae, x = build("csr"), rows(60)
    labels = ["even" if i % 2 == 0 else "odd" for i in range(60)]
    x[::2, 3] += 40  # one direction holds nearly all variance, and the label
    found = {(one.embedding, one.k): one for one in compare_retrieval(sae, x, labels, (1, 4, 12))}
    assert set(found) == {*((name, k) for name in ("sae", "pca", "random") for k in (1, 4, 12)), ("dense", D_IN)}
    assert found["pca", 1].accuracy == 1.0 and found["dense", D_IN].accuracy > 0.9
    assert found["pca", 12][2:] == pytest.approx(found["dense", D_IN][2:])  # all components are a rotation
    assert found["random", 4].l0 == 4 and 0.3 < found["random", 4].accuracy <= 1
    again = compare_retrieval(sae, x, labels, (1, 4, 12))
    assert again == list(found.values())
    assert compare_retrieval(sae, x, labels, (4,), seed=1)[2] != found["random", 4]
    elsewhere = compare_retrieval(sae, x, labels, (1,), fit=rows(60))[1]
    assert elsewhere.accuracy < 1  # the variance of other rows lies elsewhere


def test_what_cannot_be_compared_is_refused():
    sae, folder = build("csr"), cast(Any, "runs/demo/sae")
    for x, labels, ks, says in (
        (rows(4), [1, 2, 3], (4,), "3 labels for 4 items"),
        (rows(1), [1], (4,), "at least 2 items"),
        (rows(4), [1, 2, 1, 2], (D_IN + 1,), f"k={D_IN + 1} must be at most d_in={D_IN} and d_sae={D_SAE}"),
        (rows(4), [1, 2, 1, 2], (0,), "k=0"),
    ):
        with pytest.raises(ValueError, match=says):
            compare_retrieval(sae, x, labels, ks)
    with pytest.raises(ValueError, match="compare_retrieval needs an SAE"):
        compare_retrieval(folder, rows(4), [1, 2, 1, 2])
