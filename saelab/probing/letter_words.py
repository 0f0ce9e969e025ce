"""Words by their first letter, as a language model reads them: the data of the first-letter task (`letter_absorption.py`).

A word is one token: what the tokenizer marks as the beginning of a word, with nothing but two or more English letters in it; of
"The" and "the" the second counts. Every word is read at its own token, behind the same few lines that spell other words.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from saelab.errors import SaelabError
from saelab.probing.labelled_sets import LabelledSet, seed_of
from saelab.probing.rows import Harvest
from saelab.tokens.tokenizing import check_tokenizer

LETTERS = string.ascii_lowercase
TEMPLATE = " {word} has the first letter: {letter}\n"
TEST_SHARE = 3
"""One word in so many is held out."""
_WORD = re.compile(r"[\u0120\u2581]([A-Za-z]{2,})")
"""A token of a byte-level or a SentencePiece vocabulary that begins a word."""


class LetterRows(NamedTuple):
    """Words with the activations at their tokens."""

    words: tuple[str, ...]
    letters: Int[np.ndarray, " n"]
    """Of each word, the number of its first letter in `LETTERS`."""
    test: Bool[np.ndarray, " n"]
    """Which words are held out."""
    x: Float[Tensor, "n *sources d_in"]


def draw_words(tokenizer: Any, n_words: int, without: Sequence[str] = (), seed: int = 0) -> dict[str, list[str]]:
    """At most `n_words` words of each letter, drawn with `seed`; in lower case unless the vocabulary lacks that."""
    check_tokenizer(tokenizer)
    found: dict[str, str] = {}
    for token in sorted(tokenizer.get_vocab(), reverse=True):  # lower case comes first
        if match := _WORD.fullmatch(token):
            found.setdefault(match[1].lower(), match[1])
    for word in without:
        found.pop(word.lower(), None)
    drawn = {}
    for letter in LETTERS:
        words = [found[one] for one in sorted(found) if one[0] == letter]
        order = np.random.default_rng(seed_of("letter", letter, seed)).permutation(len(words))
        drawn[letter] = [words[i] for i in order[:n_words]]
    return drawn


def prompt_of(examples: Sequence[str]) -> str:
    """What stands before every word: the lines that spell the examples."""
    return "\n" + "".join(TEMPLATE.format(word=word, letter=word[0].upper()) for word in examples)


def read_words(harvest: Harvest, words: dict[str, list[str]], prompt: str, progress: bool = True) -> LetterRows:
    """The activations of the words, letter by letter from disk or from the model.

    Raises `SaelabError` if the tokenizer does not read a word behind the prompt as one token.
    """
    chosen = [letter for letter in LETTERS if words[letter]]
    told, letters, test, x = [], [], [], []
    with tqdm(chosen, desc="Words", unit="letter", disable=not progress) as bar:
        for letter in bar:
            here = words[letter]
            texts = tuple(f"{prompt} {word}" for word in here)
            labels = np.ones(len(here), dtype=bool)
            rows = harvest.rows(LabelledSet(f"letter_{letter}", "vocabulary", letter, texts, labels))
            _check(harvest.lm.tokenizer, here, [int(one[-1]) for one in rows.tokens])
            told += here
            letters += [LETTERS.index(letter)] * len(here)
            test += [i % TEST_SHARE == TEST_SHARE - 1 for i in range(len(here))]
            x.append(rows.x)
    if not told:
        raise SaelabError("The vocabulary holds no word: no token begins a word and is made of English letters.")
    return LetterRows(tuple(told), np.array(letters), np.array(test), torch.cat(x))


def _check(tokenizer: Any, words: Sequence[str], last: Sequence[int]) -> None:
    for word, token in zip(words, tokenizer.convert_ids_to_tokens(last), strict=True):
        if token[1:] != word:
            raise SaelabError(f"Behind the prompt the tokenizer reads {word!r} as several tokens ending in {token!r}.")
