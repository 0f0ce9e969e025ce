"""A label for every feature without any model: the words at its peaks, and what follows them where that says as much.

Read off samples of firings, at those that are the largest of their window; so merging collectors gives the same. A word counts by
its share of the squared activation at peaks: what a feature does strongly is what it is about, however often it fires weakly.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from saelab.features.collecting.words import Words

_N_WORDS = 4
_FEWEST = 4
"""Peaks below which there is no sharpness."""
_AT_ONE_POSITION = 0.8
_LAST_POSITION = 8
_FOLLOWED = 0.7
"""Share of peaks that one token has to follow for it to stand in the label."""


class Peaks(NamedTuple):
    """Sampled peaks of one feature."""

    tokens: np.ndarray
    """`(n,)` token numbers"""
    values: np.ndarray
    """`(n,)` activations there"""
    energy: np.ndarray
    """`(n,)` squared activation of all the firings that each stands for"""
    is_uniform: np.ndarray
    """`(n,)` whether it is of the uniform sample, by which sharpness is measured"""


class Label(NamedTuple):
    """`schema.LABEL_COLUMNS`, and the counts behind them."""

    text: str | None
    share: float | None
    sharpness: float | None
    position: int | None
    peak_tokens: list[tuple[int, int, float, float]]
    """Token id, sampled peaks, share of the squared activation at peaks, and mean activation; the largest share first."""
    words: list[str]
    """All words at the peaks, each once for every twentieth of the squared activation, and at least once."""


class Labeller:
    """Labels features of one text."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self._counts, self._n_words = words.frequencies()
        self._token_counts = np.bincount(words.ids, minlength=1) if len(words.ids) else np.zeros(1)

    def label(self, peaks: Peaks, positions: np.ndarray) -> Label:
        """The label of a feature with these peaks, whose sampled firings lie at these positions of their contexts."""
        if not len(peaks.tokens):
            return Label(None, None, None, None, [], [])
        tokens = peaks.tokens.tolist()
        words = [self.words.word(token) for token in tokens]
        stems = [self.words.stem(word) for word in words]
        energy: dict[str, float] = defaultdict(float)
        forms: dict[str, Counter[str]] = defaultdict(Counter)
        for stem, word, of_peak in zip(stems, words, peaks.energy.tolist(), strict=True):
            energy[stem] += of_peak
            forms[stem][word] += 1
        best = sorted(energy, key=lambda stem: (-energy[stem], stem))
        repeated = [stem for stem in best if sum(forms[stem].values()) > 1] or best
        chosen = repeated[:_N_WORDS]
        share = sum(energy[stem] for stem in chosen) / (sum(energy.values()) or 1.0)
        shown = [min(forms[stem].most_common(), key=lambda pair: (-pair[1], pair[0]))[0] for stem in chosen]
        sharpness = self._sharpness([stem for stem, counts in zip(stems, peaks.is_uniform, strict=True) if counts])
        text = self._followed(tokens, shown, sharpness) or ", ".join(shown)
        position = _position(positions)
        if position is not None:
            text = f"token {position + 1} of a context ({text})"
        return Label(text, share, sharpness, position, self._peak_tokens(peaks), _weighted(words, peaks.energy))

    def _sharpness(self, stems: list[str]) -> float | None:
        """Mean bits by which a peak's word is likelier than in the text, each word's likelihood taken from the other peaks."""
        if len(stems) < _FEWEST:
            return None
        counts, bits = Counter(stems), 0.0
        for stem, count in counts.items():
            likely = (count - 1) / (len(stems) - 1)
            base = (self._counts.get(stem, 0) + 1) / (self._n_words + 1)
            if likely > base:
                bits += count * math.log2(likely / base)
        return bits / len(stems)

    def _followed(self, tokens: list[int], shown: list[str], sharpness: float | None) -> str | None:
        """`word \u2192 next` where nearly all peaks are followed by one token that is rarer than their own words are sharp."""
        after = [t + 1 for t in tokens if (t + 1) % self.words.ctx_len]
        if len(after) < _FEWEST or sharpness is None:
            return None
        ((token, count),) = Counter(self.words.ids[after].tolist()).most_common(1)
        share, base = count / len(after), (self._token_counts[token] + 1) / (len(self.words.ids) + 1)
        following = self.words.token_text(after[self.words.ids[after].tolist().index(token)]).strip()
        if share < _FOLLOWED or not following or share * math.log2(share / base) < 0.7 * sharpness:
            return None
        return f"{', '.join(shown[:2])} \u2192 {following}"

    def _peak_tokens(self, peaks: Peaks, most: int = 16) -> list[tuple[int, int, float, float]]:
        ids = self.words.ids[peaks.tokens]
        found, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        means, energy = np.bincount(inverse, peaks.values) / counts, np.bincount(inverse, peaks.energy)
        shares = energy / (energy.sum() or 1.0)
        order = np.lexsort((found, -shares))[:most]
        return [(int(found[i]), int(counts[i]), float(shares[i]), float(means[i])) for i in order]


def _weighted(words: list[str], energy: np.ndarray) -> list[str]:
    """Each word in alphabetical order, as often as it has twentieths of the energy, so that a search ranks by that."""
    shares: dict[str, float] = defaultdict(float)
    for word, of_peak in zip(words, (energy / (energy.sum() or 1.0)).tolist(), strict=True):
        shares[word] += of_peak
    return [word for word in sorted(shares) for _ in range(max(1, round(20 * shares[word])))]


def _position(positions: np.ndarray) -> int | None:
    """The early position of the context at which nearly all firings lie."""
    if len(positions) < _FEWEST:
        return None
    counts = np.bincount(positions)
    commonest = int(counts.argmax())
    return commonest if commonest < _LAST_POSITION and counts[commonest] >= _AT_ONE_POSITION * len(positions) else None
