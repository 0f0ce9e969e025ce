"""First-letter splitting and absorption of an SAE: how many features a letter needs, and how often they stay off where the letter
is there and another feature writes it. After Chanin et al. 2024 (`word_absorption.py`); docs/absorption.md says what is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from saelab.evaluation.heldout import bos_of
from saelab.files import locked
from saelab.kernels.sparse_acts import SparseActs
from saelab.probing.letter_report import Letter, LetterReport
from saelab.probing.letter_words import LETTERS, LetterRows, draw_words, prompt_of, read_words
from saelab.probing.rows import Harvest
from saelab.probing.running import ROWS, checked_hooks, one_thread
from saelab.probing.sparse_probes import f1, sparse_weights, split_of
from saelab.probing.word_absorption import absorbed
from saelab.saes import SAE
from saelab.saes.trained_hooks import hooks_of
from saelab.steering.logistic import fit_logistic
from saelab.steering.trial_file import TrialFile
from saelab.tokens.tokenizing import context_start
from saelab.validation import check_at_least, check_fields

PENALTY = 1e-5
"""L2 penalty of the probes on activations."""
MIN_WORDS = 20
"""Held-out words that the probe gets right, below which a letter is not measured."""
MIN_F1 = 0.6
"""Least F1 of the probe, likewise."""
_VERSION = 1
_MAX_TOKENS = 512


@dataclass(frozen=True)
class LetterConfig:
    """Sizes of the first-letter task."""

    n_words: int = 180
    """Most words of a letter; a third of them is held out."""
    max_k: int = 10
    """Most features of a k-sparse probe."""
    examples: tuple[str, ...] = ("time", "house")
    """Words that are spelled before every word; none: words stand alone."""
    seed: int = 0
    """Of the draw of the words."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "n_words", "max_k")
        check_at_least(self, 0, "seed")
        if self.n_words < 4 * MIN_WORDS:
            raise ValueError(
                f"n_words={self.n_words} must be at least {4 * MIN_WORDS}: a third of the words of a letter is held out, and the "
                f"probe must get {MIN_WORDS} of those right, or the letter is not measured."
            )
        if not all(isinstance(word, str) and word.isalpha() for word in self.examples):
            raise ValueError(f"examples={self.examples!r}; expected words of letters, such as ('time', 'house').")


def first_letters(
    sae: SAE,
    lm: Any,
    config: LetterConfig | None = None,
    *,
    folder: str | Path,
    hook_name: str | Sequence[str] | None = None,
    progress: bool = True,
) -> LetterReport:
    """Measure splitting and absorption of first letters. Activations are kept in `folder/rows`, finished letters in
    `folder/letters-HASH.jsonl`, so that the same call goes on where it was interrupted.

    Raises `ValueError` for an SAE that does not reconstruct what it reads or does not fit the model, and for a model that is
    being steered; `SaelabError` for a vocabulary without words, or while another process works in `folder`.
    """
    config = config or LetterConfig()
    hooks = checked_hooks(sae, lm, hook_name, "first_letters")
    if hooks_of(sae, hook_name).outputs != hooks:
        raise ValueError(f"first_letters needs an SAE that reconstructs what it reads; this {sae.variant} does not.")
    words = draw_words(lm.tokenizer, config.n_words, config.examples, config.seed)
    folder = Path(folder)
    with locked(folder, f"Another process is probing in {folder}: wait until it is done."):
        start = context_start(lm, bos_of(sae.provenance.origin, lm))
        harvest = Harvest(lm, hooks, folder / ROWS, start=start, n_texts=config.n_words, max_tokens=_MAX_TOKENS)
        rows = read_words(harvest, words, prompt_of(config.examples), progress)
        settings = {"saelab_letters": _VERSION, "sae": sae.hash, **harvest.settings, **asdict(config)}
        kept = TrialFile(folder, {**settings, "examples": list(config.examples)}, "letters")
        letters = measure_letters(sae, rows, config.max_k, kept, progress)
    return LetterReport(letters, asdict(config), {"sae": sae.hash, "model": lm.name, "hooks": list(hooks)})


def measure_letters(
    sae: SAE, rows: LetterRows, max_k: int, kept: TrialFile | None = None, progress: bool = True
) -> list[Letter]:
    """Every letter of the alphabet, those in `kept` as they were found before."""
    known = {} if kept is None else kept.batches
    task: _Task | None = None
    found = []
    with one_thread(), tqdm(LETTERS, desc="Letters", unit="letter", disable=not progress) as bar:
        for letter in bar:
            told = known.get(letter)
            if told is None:
                task = task or _Task(sae, rows, max_k)
                told = task.letter(letter)._asdict()
                if kept is not None:
                    kept.add(letter, told)
            found.append(Letter.of(told))
    return found


class _Task:
    """What all letters share."""

    @torch.no_grad()
    def __init__(self, sae: SAE, rows: LetterRows, max_k: int) -> None:
        self.rows, self.max_k = rows, max_k
        x = rows.x.float().to(sae.center.device)
        self.sizes = sae.token_sizes(x if x.ndim == 2 else x.flatten(1)).cpu().expand(len(x), 1)
        self.feature_acts = sae.encode(x)
        self.directions = _directions(sae, x.shape[1] if x.ndim == 3 else 1)
        self.x = rows.x.flatten(1).double()
        train = torch.from_numpy(np.flatnonzero(~rows.test))
        labels = torch.from_numpy(rows.letters)[train][:, None] == torch.arange(len(LETTERS))
        self.present = labels.any(0) & ~labels.all(0)
        weights = sparse_weights(_on_cpu(self.feature_acts).select_rows(train), labels[:, self.present])
        self.weights = torch.zeros(len(LETTERS), sae.d_sae, dtype=torch.float64)
        self.weights[self.present] = weights

    def letter(self, letter: str) -> Letter:
        """What was found for a letter."""
        number = LETTERS.index(letter)
        y, test = self.rows.letters == number, self.rows.test
        counts: dict[str, Any] = {"n_words": int(y.sum()), "n_test": int((y & test).sum())}
        if not self.present[number] or not counts["n_test"]:
            return Letter(letter, **counts, reason="no words")
        probe, said = self._probe(y, test)
        quality = f1(said[test], y[test])
        right = y & test & said
        counts |= {"n_right": int(right.sum()), "probe_f1": quality}
        if counts["n_right"] < MIN_WORDS:
            return Letter(letter, **counts, reason="not enough words")
        if quality < MIN_F1:
            return Letter(letter, **counts, reason="the probe is too weak")
        found = split_of(self.feature_acts, self.weights[number], y, test, self.max_k)
        if not found.main:
            return Letter(letter, **counts, reason="no feature tells it")
        return Letter(letter, **counts, **found._asdict(), **self._absorbed(probe, right, found.main))

    def _probe(
        self, y: Bool[np.ndarray, " n"], test: Bool[np.ndarray, " n"]
    ) -> tuple[Float[Tensor, " d"], Bool[np.ndarray, " n"]]:
        """A logistic regression on the activations of the words to train on, and what it says of all words."""
        fit = torch.from_numpy(np.flatnonzero(~test))
        weight, bias = fit_logistic(self.x[fit], torch.from_numpy(y[~test]).double(), PENALTY)
        return weight, ((self.x @ weight + bias) > 0).numpy()

    def _absorbed(self, probe: Tensor, right: Bool[np.ndarray, " n"], main: Sequence[int]) -> dict[str, Any]:
        """Absorption on the held-out words that the probe gets right."""
        where = torch.from_numpy(np.flatnonzero(right))
        feature_acts = _on_cpu(self.feature_acts).select_rows(where)
        found = absorbed(feature_acts, self.directions, self.sizes[where], self.x[where], probe, main)
        words = [self.rows.words[i] for i in where]
        taken = {word: int(i) for word, i, full in zip(words, found.absorber, found.full, strict=True) if full}
        return {
            "full": found.full.int().tolist(),
            "fraction": found.fraction.tolist(),
            "absorbed": taken,
            "n_against": int((~found.positive).sum()),
        }


def _directions(sae: SAE, n_sources: int) -> Float[Tensor, "d_sae d"]:
    """What a feature activation of 1 writes at a token of size 1, in raw units; the sources of a crosscoder side by side."""
    sources = [sae.decoder(source) for source in (range(n_sources) if n_sources > 1 else (-1,))]
    return torch.cat([(rows.double() / scale.double()).cpu() for rows, scale in sources], 1)


def _on_cpu(found: SparseActs) -> SparseActs:
    return SparseActs(found.values.float().cpu(), found.features.cpu(), found.offsets.cpu(), found.d_sae)
