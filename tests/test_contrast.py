"""Which features tell two sets of texts apart: the counts, the statistics behind them, and what is claimed of how many texts."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest

import saelab
from saelab.features.contrast import MIN_TEXTS, Side, compare, lines
from saelab.features.intervals import benjamini_hochberg, fisher, newcombe
from saelab.features.text_sets import contrast_texts

A = [f"The weather today is fine {word}, and the river runs." for word in "abcdefghijkl"]
B = [f"def main({word}): return {word} + 1" for word in "abcdefghijk"]


@pytest.fixture(scope="module")
def store(hostile_run):
    return saelab.load_features(hostile_run)


@pytest.fixture(scope="module")
def found(store, tiny_lm):
    return contrast_texts(store, tiny_lm, A, B)


def test_the_counts_are_those_of_the_saes_own_encode(store, tiny_lm, found):
    for texts, side in ((A, found.a), (B, found.b)):
        fired, mean = np.zeros(len(store), dtype=int), np.zeros(len(store))
        for text in texts:
            (x,) = next(iter(tiny_lm.stream_activations([text], store.hook_name)))[store.hook_name]
            dense = store.sae.encode(x[1:].clone()).to_dense().detach().double().numpy()  # the first token is masked
            fired += (dense != 0).any(0)
            mean += dense.mean(0) / len(texts)
        assert side.n_texts == len(texts) and (side.n_fired == fired).all() and side.mean == pytest.approx(mean)
    assert not any(one.is_inference() for one in store.sae.parameters())
    assert found.difference == pytest.approx(found.a.n_fired / len(A) - found.b.n_fired / len(B))


def test_rows_are_sorted_by_the_difference_and_labelled(store, found):
    for side, sign in (("a", 1), ("b", -1)):
        rows = found.rows(1000, side)
        differences = [sign * row["difference"] for row in rows]
        assert differences == sorted(differences, reverse=True) and differences[-1] > 0 and rows[0]["found"]
        for row in rows:
            assert row["low"] <= row["difference"] <= row["high"] and row["p"] <= row["q"] <= 1
            assert row["label"] == store.feature(row["feature"]).label
    assert len(found.rows(3)) == 3 and f"{int(found.found.sum())} differ" in found.summary
    with pytest.raises(ValueError, match="more_in='c'"):
        found.rows(1, "c")


def test_no_claim_is_made_of_few_texts(store, tiny_lm):
    few = store.contrast(tiny_lm, A[: MIN_TEXTS - 1], B)
    assert not few.enough and not few.found.any() and not any(row["found"] for row in few.rows())
    assert f"fewer than {MIN_TEXTS} texts" in few.summary
    same = store.contrast(tiny_lm, A, A)
    assert not same.found.any() and same.rows() == [] and "No feature differs" in same.summary


def test_texts_that_say_nothing_more_are_left_out(store, tiny_lm):
    found = store.contrast(tiny_lm, [*A, A[0], "", "x"], B)
    assert (found.a.n_texts, found.a.n_left_out) == (len(A), 3) and "3 texts left out" in found.summary


def test_what_cannot_be_compared_is_refused(store, tiny_lm):
    for texts, said in (
        ([], "holds no text"),
        (["x"], "counted token"),
        (["word " * 200], "split it"),
        ("text", "one text"),
    ):
        with pytest.raises(ValueError, match=said):
            contrast_texts(store, tiny_lm, A, texts)


def test_progress_counts_texts_and_may_stop_the_pass(store, tiny_lm):
    seen = []
    contrast_texts(store, tiny_lm, A, B, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(A) + len(B),) * 2 and len(seen) == 2

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        contrast_texts(store, tiny_lm, A, B, progress=stop)


def test_newcombes_interval():
    """Examples of Newcombe (1998), table II, method 10."""
    for (a, n_a, b, n_b), wanted in {
        (56, 70, 48, 80): (0.0524, 0.3339),
        (9, 10, 3, 10): (0.1705, 0.8090),
        (10, 10, 0, 20): (0.6791, 1.0),
    }.items():
        low, high = newcombe(np.array([a]), n_a, np.array([b]), n_b)
        assert (low[0], high[0]) == pytest.approx(wanted, abs=1e-4)


def test_fishers_test_is_the_share_of_all_orders_that_are_as_unlikely():
    n_a, n_b = 4, 5
    for a, b in product(range(n_a + 1), range(n_b + 1)):
        tables = Counter()
        for x in range(n_a + 1):
            if 0 <= a + b - x <= n_b:
                tables[x] = math.comb(n_a, x) * math.comb(n_b, a + b - x)
        wanted = sum(n for n in tables.values() if n <= tables[a]) / tables.total()
        assert fisher(np.array([a]), n_a, np.array([b]), n_b)[0] == pytest.approx(wanted)
    p = fisher(np.array([10, 5]), 10, np.array([0, 5]), 10)
    assert p == pytest.approx([2 / math.comb(20, 10), 1.0])


def test_q_is_the_rate_at_which_a_test_becomes_a_discovery():
    p = np.array([0.01, 0.04, 0.03, 0.5, 0.001])
    q = benjamini_hochberg(p)
    for i, rate in product(range(5), np.linspace(0.001, 1, 777)):
        ranked = np.sort(p)
        passing = [k for k in range(1, 6) if ranked[k - 1] <= rate * k / 5]
        discovered = bool(passing) and p[i] <= ranked[passing[-1] - 1]
        assert discovered == (q[i] <= rate)


def test_chance_alone_is_seldom_a_discovery(store):
    """Two samples of one population, many times: at most one in twenty has any discovery."""
    rng, false = np.random.default_rng(0), 0
    for _ in range(100):
        rates = rng.beta(0.3, 2, len(store))
        a, b = (Side(20, 0, rng.binomial(20, rates), np.zeros(len(store))) for _ in range(2))
        false += bool(compare(store, a, b).found.any())
    assert false <= 5


def test_lines():
    assert lines("one\r\n\n  two  \n\t\nthree") == ["one", "two", "three"]
