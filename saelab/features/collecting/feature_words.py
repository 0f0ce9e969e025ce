"""The words of every feature: its label, the rows of the token index, and what the search index finds it by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from saelab.features.collecting.accumulate import Accumulator
from saelab.features.collecting.kept import Examples
from saelab.features.collecting.labelling import Label, Labeller, Peaks
from saelab.features.collecting.signed import SignedAccumulator
from saelab.features.collecting.words import Words
from saelab.features.schema import LOWEST_OCTAVE, OCTAVES, WINDOW_LEFT

_FEW = 8
"""Below this many peaks in the uniform sample the strongest examples count for sharpness too."""
_AROUND = 8
"""Tokens on each side of a peak that can be searched for."""
_SEARCHED = 10
"""Examples of each kind whose surroundings can be searched for."""


class FeatureWords:
    """Labels of features at their dominant end, computed once each."""

    def __init__(self, state: SignedAccumulator, words: Words) -> None:
        self._ends = {sign: _End(end) for sign, end in state.ends.items()}
        self._signs, self._words, self._labeller = state.sign.tolist(), words, Labeller(words)
        self._labels: dict[int, Label] = {}

    def label(self, feature: int) -> Label:
        """The label of one feature."""
        if feature not in self._labels:
            end = self._ends[self._signs[feature]]
            self._labels[feature] = self._labeller.label(end.peaks(feature), end.positions(feature))
        return self._labels[feature]

    def peak_rows(self) -> Iterator[tuple[int, int, int, float, float]]:
        """Rows of the table `peak`."""
        for feature in range(len(self._signs)):
            for token, count, share, mean in self.label(feature).peak_tokens:
                yield token, feature, count, share, mean

    def search_rows(self) -> Iterator[tuple[int, str, str, str]]:
        """Rows of the search index: label, words at peaks, text around them."""
        for feature in range(len(self._signs)):
            label = self.label(feature)
            if label.text is not None:
                yield feature, label.text, " ".join(label.words), self._context(feature)

    def _context(self, feature: int) -> str:
        ctx_len, found = self._words.ctx_len, []
        for token in self._ends[self._signs[feature]].searched(feature):
            start = token - token % ctx_len
            found.append(self._words.text(max(start, token - _AROUND), min(start + ctx_len, token + _AROUND + 1)))
        return "\n".join(found)


class _End:
    """Examples of one end as arrays, with where those of each feature begin."""

    def __init__(self, end: Accumulator) -> None:
        self.ctx_len = end.ctx_len
        self._columns: dict[str, tuple[np.ndarray, ...]] = {}
        self._octaves = end.histogram.view(end.d_sae, OCTAVES, -1).sum(2).numpy()
        for kind in ("examples", "uniform", "octave"):
            examples = end.kept[kind].examples
            features = examples.group.numpy() // (OCTAVES if kind == "octave" else 1)
            bounds = np.searchsorted(features, np.arange(end.d_sae + 1))
            self._columns[kind] = bounds, examples.token.numpy(), examples.value.numpy(), _is_peak(examples)

    def _of(self, kind: str, feature: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        bounds, *columns = self._columns[kind]
        here = slice(bounds[feature], bounds[feature + 1])
        tokens, values, is_peak = (column[here] for column in columns)
        return tokens, values, is_peak

    def peaks(self, feature: int) -> Peaks:
        """Firings that are the largest of their window: of the uniform sample, of the samples per octave, and the strongest."""
        found = [self._of(kind, feature) for kind in ("uniform", "octave", "examples")]
        tokens, values, is_peak = (np.concatenate(columns) for columns in zip(*found, strict=True))
        _, first = np.unique(tokens, return_index=True)
        first.sort()
        octaves = np.clip(np.frexp(np.abs(values[first]))[1] - 1 - LOWEST_OCTAVE, 0, OCTAVES - 1)
        stands_for = self._octaves[feature][octaves] / np.bincount(octaves, minlength=OCTAVES)[octaves]
        is_uniform = first < len(found[0][0])
        if int((is_uniform & is_peak[first]).sum()) < _FEW:
            is_uniform |= np.isin(tokens[first], found[2][0])
        kept = is_peak[first]
        energy = stands_for * values[first].astype(np.float64) ** 2
        return Peaks(tokens[first][kept], values[first][kept], energy[kept], is_uniform[kept])

    def positions(self, feature: int) -> np.ndarray:
        """Context positions of sampled firings."""
        return self._of("uniform", feature)[0] % self.ctx_len

    def searched(self, feature: int) -> list[int]:
        """Tokens whose surroundings can be searched for."""
        both: list[Any] = [self._of(kind, feature)[0][:_SEARCHED] for kind in ("examples", "uniform")]
        return list(dict.fromkeys(np.concatenate(both).tolist()))


def _is_peak(examples: Examples) -> np.ndarray:
    """Whether the example's own value is the largest magnitude of its window."""
    windows = np.abs(examples.windows.dense().numpy())
    if not len(windows):
        return np.zeros(0, dtype=bool)
    return windows[:, WINDOW_LEFT] >= windows.max(1)
