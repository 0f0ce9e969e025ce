"""First letters: on planted rows exactly the planted words are absorbed, a split letter takes its two features, and each part is
what its formula says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_saes import build
from tiny_saes import rows as tiny_rows

from saelab.errors import SaelabError
from saelab.kernels.sparse_acts import SparseActs
from saelab.probing import letters as module
from saelab.probing.letter_report import Letter, LetterReport, save, told
from saelab.probing.letter_words import LETTERS, LetterRows, _check, draw_words, prompt_of
from saelab.probing.letters import LetterConfig, first_letters, measure_letters
from saelab.probing.sparse_probes import best_features, f1, n_split, sparse_weights
from saelab.probing.word_absorption import absorbed
from saelab.saes import VARIANTS, ReLUConfig, ReLUSAE, TranscoderConfig, TranscoderSAE
from saelab.steering.trial_file import TrialFile

N, CHOSEN = 72, "abcd"
ABSORBED = range(10, 30)
"""Words of "a", by number, whose own feature writes the letter too."""
LETTER, WORD = 3.0, 2.0


def planted_rows() -> LetterRows:
    """Each word is its letter's direction and one of its own, all orthonormal; "z" has one word."""
    n_words = len(CHOSEN) * N + 1
    letters = np.array([*np.repeat(np.arange(len(CHOSEN)), N), LETTERS.index("z")])
    x = torch.zeros(n_words, len(CHOSEN) + n_words)
    x[torch.arange(n_words - 1), torch.from_numpy(letters[:-1])] = LETTER
    x[torch.arange(n_words), len(CHOSEN) + torch.arange(n_words)] = WORD
    words = tuple(f"{LETTERS[letter]}{i}" for i, letter in enumerate(letters))
    return LetterRows(words, letters, np.arange(n_words) % 3 == 2, x)


def planted_sae(d_in: int) -> ReLUSAE:
    """A feature for each letter, but two for "b", one of either half of its words; that of "a" stays off on the absorbed words,
    each of which has a feature that writes the word and the letter."""
    sae = ReLUSAE(ReLUConfig(len(CHOSEN) + 1 + len(ABSORBED), normalize="none"), d_in).requires_grad_(False)
    word, off = len(CHOSEN), LETTER / WORD
    for weight in (sae.W_enc, sae.W_dec):
        weight.zero_()
    for feature, letter in enumerate((0, 1, 2, 3, 1)):
        sae.W_enc[feature, letter] = sae.W_dec[feature, letter] = 1
    sae.W_enc[0, [word + i for i in ABSORBED]] = -off
    sae.W_enc[1, word + N : word + N + N // 3] = -off  # the smaller part of "b" is left to feature 4
    sae.W_enc[4, word + N + N // 3 : word + 2 * N] = -off
    for feature, i in enumerate(ABSORBED, len(CHOSEN) + 1):
        sae.W_dec[feature, 0], sae.W_dec[feature, word + i] = LETTER, WORD
        sae.W_dec[feature] /= sae.W_dec[feature].norm()
        sae.W_enc[feature, word + i] = (LETTER**2 + WORD**2) ** 0.5 / WORD
    return sae


@pytest.fixture(scope="module")
def rows() -> LetterRows:
    return planted_rows()


@pytest.fixture(scope="module")
def sae(rows) -> ReLUSAE:
    return planted_sae(rows.x.shape[1])


@pytest.fixture(scope="module")
def letters(sae, rows) -> dict[str, Letter]:
    return {one.letter: one for one in measure_letters(sae, rows, 4, progress=False)}


# --- planted rows


def test_exactly_the_planted_words_are_absorbed(letters, rows):
    wanted = {f"a{i}": len(CHOSEN) + 1 + i - ABSORBED[0] for i in ABSORBED if rows.test[i]}
    assert letters["a"].absorbed == wanted and len(wanted) == 7
    on = [int(i in ABSORBED) for i in range(N) if rows.test[i]]
    assert list(letters["a"].full) == on and list(letters["a"].fraction) == on
    for letter in "bcd":
        assert not any(letters[letter].full) and not any(letters[letter].fraction)
    assert all(letters[letter].n_right == letters[letter].n_test == N // 3 for letter in CHOSEN)


def test_a_split_letter_takes_two_features(letters):
    assert list(letters["b"].main) == [1, 4] and letters["b"].f1[1] == 1 > letters["b"].f1[0] + 0.03
    assert [list(letters[letter].main) for letter in "acd"] == [[0], [2], [3]]


def test_letters_without_enough_words_say_so(letters, sae, rows):
    assert letters["z"].reason == "no words" and letters["q"].n_words == 0
    few = LetterRows(rows.words, rows.letters, rows.test & (np.arange(len(rows.words)) % 6 == 2), rows.x)
    assert {one.reason for one in measure_letters(sae, few, 4, progress=False)[:4]} == {"not enough words"}


def test_a_weak_probe_is_not_measured(sae, rows):
    shuffled = np.random.default_rng(0).permutation(rows.letters[:-1])
    blind = rows._replace(letters=np.append(shuffled, rows.letters[-1]))
    found = measure_letters(sae, blind, 4, progress=False)
    assert all(one.reason in ("not enough words", "the probe is too weak") for one in found[:4])


def test_finished_letters_are_not_measured_again(sae, rows, letters, tmp_path, monkeypatch):
    real, kept = module._Task.letter, TrialFile(tmp_path, {"a": 1}, "letters")

    def stops_at_c(self, letter):
        if letter == "c":
            raise KeyboardInterrupt
        return real(self, letter)

    monkeypatch.setattr(module._Task, "letter", stops_at_c)
    with pytest.raises(KeyboardInterrupt):
        measure_letters(sae, rows, 4, kept, progress=False)
    asked = []
    monkeypatch.setattr(module._Task, "letter", lambda self, letter: (asked.append(letter), real(self, letter))[1])
    again = measure_letters(sae, rows, 4, TrialFile(tmp_path, {"a": 1}, "letters"), progress=False)
    assert asked == list(LETTERS[2:])
    assert again == list(letters.values())


# --- parts


def test_absorption_is_the_formula_word_by_word():
    kinds = [word_by_word(seed) for seed in range(4)]
    assert set().union(*kinds) == {(full, part) for full in (True, False) for part in ("none", "part", "all")} - {
        (True, "part")
    }


def word_by_word(seed: int) -> set[tuple[bool, str]]:
    """Compares random words with the formula; returns which kinds of words there were."""
    generator = torch.Generator().manual_seed(seed)
    n, d, d_sae, main = 60, 8, 20, [2, 7]
    z = torch.randn(n, d_sae, generator=generator).sub(0.7).relu() * torch.rand(d_sae, generator=generator)
    directions = torch.randn(d_sae, d, generator=generator).double()
    probe, sizes = torch.randn(d, generator=generator).double(), 0.5 + torch.rand(n, 1, generator=generator)
    directions[5] -= (directions[5] @ probe) / (probe @ probe) * probe - 0.005 * probe / probe.norm() * directions[
        5
    ].norm()
    z[::10], z[::10, 5] = 0, 3  # alone on these words, and nearly at a right angle to the probe
    x = (z.double() @ directions) * torch.rand(n, 1, generator=generator).double() * 1.5
    found = absorbed(SparseActs.from_dense(z), directions, sizes, x, probe, main)
    direction, kinds = probe / probe.norm(), set()
    for t in range(n):
        p = float(x[t] @ direction)
        cosine = [float(F.cosine_similarity(directions[i], direction, 0)) for i in range(d_sae)]
        parts = [float(z[t, i].double() * sizes[t].double() * (directions[i] @ direction)) for i in range(d_sae)]
        top = max(range(d_sae), key=lambda i: parts[i])
        full = p > 0 and not any(z[t, main]) and cosine[top] >= 0.025 and parts[top] >= 0.4 * p
        mine = sum(parts[i] for i in main)
        rest = sorted(parts[i] for i in range(d_sae) if i not in main and cosine[i] >= 0.1 and parts[i] > 0)[-3:]
        fraction = 0.0
        if p > 0 and mine < p and sum(rest) >= 0.4 * p:
            took = min(sum(rest), p - mine)
            fraction = 1.0 if mine <= 0 else took / (took + mine)
        assert bool(found.full[t]) == full and float(found.fraction[t]) == pytest.approx(fraction, abs=1e-9)
        assert bool(found.positive[t]) == (p > 0) and int(found.absorber[t]) == (top if parts[top] > 0 else -1)
        kinds.add((full, "none" if fraction == 0 else "all" if fraction == 1 else "part"))
    return kinds


def test_the_l1_probe_is_the_minimum(rows, sae):
    """At the minimum the gradient of the log-loss is -l1 sign(w), or within l1 where w is 0."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(80, 12, generator=generator).relu() * torch.linspace(0.1, 9, 12)
    y = torch.stack([dense[:, 2] + 0.3 * dense[:, 5] > 0.5, torch.rand(80, generator=generator) < 0.3], 1)
    w = sparse_weights(SparseActs.from_dense(dense), y, l1=0.02, n_steps=4000)
    x = dense.double() / (dense.double().sum(0) / (dense != 0).sum(0))
    for label in range(2):
        here = y[:, label].double()
        share = torch.where(here > 0, 0.5 / here.sum(), 0.5 / (1 - here).sum())
        bias = torch.tensor(0.0).double()
        for _ in range(100):  # Newton's method
            p = torch.sigmoid(x @ w[label] + bias)
            bias -= (share @ (p - here)) / (share @ (p * (1 - p)))
        slope = x.T @ (share * (torch.sigmoid(x @ w[label] + bias) - here))
        on = w[label] != 0
        torch.testing.assert_close(slope[on], -0.02 * w[label][on].sign(), atol=1e-4, rtol=0)
        assert float(slope.abs().max()) <= 0.02 + 1e-4 and int(on.sum()) < 12
    assert bool((w[0] != 0).any())
    assert best_features(w[0], 3)[0] == 2 and best_features(-w[0].abs(), 3) == []


def test_scores_by_hand():
    y = np.array([True, True, True, False, False])
    assert f1(np.array([True, True, False, True, False]), y) == pytest.approx(2 / 3)
    assert f1(~y, y) == 0
    assert (
        n_split([0.5, 0.53, 0.56, 0.57, 0.9], 0.03) == 3 and n_split([0.5], 0.03) == 1 and n_split([0.5, 0.4], 0) == 1
    )


# --- words


def vocabulary(*tokens: str) -> SimpleNamespace:
    return SimpleNamespace(get_vocab=lambda: {token: i for i, token in enumerate(tokens)})


def test_words_are_tokens_that_begin_one(monkeypatch):
    monkeypatch.setattr("saelab.probing.letter_words.check_tokenizer", lambda _: None)
    tokenizer = vocabulary(
        "\u0120the", "\u0120The", "\u2581tree", "tall", "\u0120t", "\u0120Ten", "\u0120t1", "\u0120time", "\u0120apple"
    )
    found = draw_words(tokenizer, 9, ["Time"])
    assert set(found) == set(LETTERS) and sorted(found["t"]) == ["Ten", "the", "tree"] and found["a"] == ["apple"]
    assert len(draw_words(tokenizer, 2)["t"]) == 2
    many = vocabulary(*(f"\u0120s{a}{b}" for a in LETTERS for b in LETTERS))
    first, other = draw_words(many, 50)["s"], draw_words(many, 50, seed=1)["s"]
    assert first == draw_words(many, 50)["s"] != other
    assert prompt_of(["time"]) == "\n time has the first letter: T\n" and prompt_of([]) == "\n"


def test_a_word_that_the_prompt_breaks_is_an_error():
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: ["\u0120dog", "gs"])
    with pytest.raises(SaelabError, match="'frogs' as several tokens ending in 'gs'"):
        _check(tokenizer, ["dog", "frogs"], [1, 2])


# --- the call and the report


def test_the_same_call_reads_and_measures_once(tiny_lm, tmp_path, monkeypatch):
    hook = "blocks.1.hook_resid_post"
    sae = ReLUSAE(ReLUConfig(64, normalize="none"), 32, 3)
    first = first_letters(sae, tiny_lm, LetterConfig(80, examples=()), folder=tmp_path, hook_name=hook, progress=False)
    assert sum(one.n_words for one in first.letters) > 3 and not first.measured
    monkeypatch.setattr(type(tiny_lm), "stream_activations", None)
    again = first_letters(sae, tiny_lm, LetterConfig(80, examples=()), folder=tmp_path, hook_name=hook, progress=False)
    assert again.data() == first.data() and first.data()["absorption"] == {"full": None, "fraction": None}
    assert "No letter has enough words" in told(first)[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_words": 0}, "n_words=0"),
        ({"n_words": 79}, "n_words=79 must be at least 80"),
        ({"max_k": 0}, "max_k=0"),
        ({"examples": ("a b",)}, "examples="),
    ],
)
def test_sizes_out_of_range_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        LetterConfig(**change)


def test_what_writes_elsewhere_is_refused(tiny_lm, tmp_path):
    sae = TranscoderSAE(TranscoderConfig(64, k=4), d_in=32, d_out=32)
    hooks = ["blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"]
    with pytest.raises(ValueError, match=f"reconstructs what it reads; this {sae.variant} does not"):
        first_letters(sae, tiny_lm, folder=tmp_path, hook_name=hooks)


def test_the_report_resamples_words_within_letters(letters, tmp_path):
    report = LetterReport(list(letters.values()), {}, {"sae": "s", "model": "m", "hooks": ["h"]})
    full = report.mean("full")
    assert full is not None and full.mean == pytest.approx(7 / 24 / 4)
    draws = np.random.default_rng(1).binomial(24, 7 / 24, 4000) / 24 / 4
    assert (full.low, full.high) == pytest.approx(tuple(np.quantile(draws, (0.025, 0.975))), abs=0.012)
    data = report.data()
    assert data["n_measured"] == 4 and data["n_main"] == 1.25 and data["letters"][0]["full_rate"]["mean"] == 7 / 24
    assert save(report, tmp_path / "letters.json").exists()
    assert any("a letter takes 1.25 features" in line for line in told(report)[1:])


def test_every_variant_is_measured():
    letters = np.repeat(np.arange(4), 63)
    x = tiny_rows(len(letters)) / 3
    x[np.arange(len(letters)), letters] += 6
    for name in VARIANTS:
        sae = build(name).requires_grad_(False)
        here = x if "n_sources" not in sae.shape else torch.stack([x] * sae.shape["n_sources"], 1)
        words = LetterRows(tuple(map(str, range(len(letters)))), letters, np.arange(len(letters)) % 3 == 2, here)
        for one in measure_letters(sae, words, 3, progress=False)[:4]:
            assert one.n_right >= 20 and one.reason in (None, "no feature tells it"), (name, one)
            assert all(0 <= fraction <= 1 for fraction in one.fraction) and len(one.main) <= len(one.f1) <= 3, name
