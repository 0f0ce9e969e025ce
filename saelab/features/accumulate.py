"""Streaming statistics of every feature, updated batch by batch from its non-zero activations.

Memory is bounded: it grows with the number of features, not of tokens. Counts, sums, maxima, histogram and top examples
are exact. So is p99 while at most `MAX_VALUES` values have been seen in all; beyond that a feature keeps its values on
`MAX_VALUES / (2 d_sae)` of its tokens (at least 256), those with the smallest hash, which is a uniform sample: with
256 values the sample's p99 lies between the true 98th and 99.8th percentile in two cases out of three.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.features.schema import BINS_PER_OCTAVE, LOWEST_OCTAVE, N_BINS, WINDOW_LEFT, WINDOW_RIGHT
from saelab.kernels.sparse_acts import SparseActs

MAX_VALUES = 16_000_000
MIN_SAMPLE = 256
_WINDOW = WINDOW_LEFT + 1 + WINDOW_RIGHT


class Entries(NamedTuple):
    """Non-zero values of one batch, sorted by feature and then by token."""

    features: Int[Tensor, " nnz"]
    tokens: Int[Tensor, " nnz"]
    """Token number in the whole pass: context * ctx_len + position."""
    docs: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]

    def take(self, index: Tensor) -> Entries:
        return Entries(*(column[index] for column in self))


def sorted_entries(feature_acts: SparseActs, tokens: Int[Tensor, " batch"], docs: Int[Tensor, " batch"]) -> Entries:
    """Sort the feature activations of the kept rows by feature; `tokens` (ascending) and `docs` number those rows."""
    order, rows, _ = feature_acts.by_feature
    return Entries(feature_acts.features[order], tokens[rows], docs[rows], feature_acts.values[order].float())


class Accumulator:
    """Running statistics of `d_sae` features with positive values only; `signed.py` holds one for each end of signed features."""

    def __init__(self, d_sae: int, ctx_len: int, top_k: int) -> None:
        self.d_sae, self.ctx_len, self.top_k = d_sae, ctx_len, top_k
        self.n_fired = torch.zeros(d_sae, dtype=torch.int64)
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        self.total_square = torch.zeros(d_sae, dtype=torch.float64)
        self.maximum = torch.full((d_sae,), -torch.inf)
        self.histogram = torch.zeros(d_sae, N_BINS, dtype=torch.int32)
        self.top_value = torch.full((d_sae, top_k), -torch.inf)
        self.top_token = torch.zeros(d_sae, top_k, dtype=torch.int64)
        self.top_doc = torch.zeros(d_sae, top_k, dtype=torch.int64)
        self.top_window = torch.zeros(d_sae, top_k, _WINDOW)
        self._sample: list[tuple[Tensor, Tensor, Tensor]] = []  # feature, value, hash of the token
        self._sampled = 0

    def update(self, feature_acts: SparseActs, tokens: Int[Tensor, " batch"], docs: Int[Tensor, " batch"]) -> None:
        """Count one batch (see `sorted_entries`)."""
        self.add(entries := sorted_entries(feature_acts, tokens, docs), entries)

    def add(self, entries: Entries, around: Entries) -> None:
        """Count the entries of one batch; the windows of examples show the values of `around`."""
        self._count(entries)
        self._keep_sample(entries)
        self._keep_top(entries, around)

    def _count(self, entries: Entries) -> None:
        features, values = entries.features, entries.values
        self.n_fired += torch.bincount(features, minlength=self.d_sae)
        self.total.index_add_(0, features, values.double())
        self.total_square.index_add_(0, features, values.double().square())
        self.maximum.scatter_reduce_(0, features, values, "amax")
        # Exponent and the two leading mantissa bits of a float32: four exact bins per octave.
        bins = (values.abs().view(torch.int32) >> 21) - BINS_PER_OCTAVE * (127 + LOWEST_OCTAVE)
        flat = features * N_BINS + bins.clamp(0, N_BINS - 1)
        self.histogram.view(-1).index_add_(0, flat, torch.ones_like(bins))

    def _keep_sample(self, entries: Entries) -> None:
        self._sample.append((entries.features.int(), entries.values, token_hash(entries.tokens)))
        self._sampled += entries.values.numel()
        if self._sampled > MAX_VALUES:
            features, values, hashes = (torch.cat(tensors) for tensors in zip(*self._sample, strict=True))
            order = _sort_by(features, hashes)
            kept = order[_rank(features[order]) < max(MIN_SAMPLE, MAX_VALUES // (2 * self.d_sae))]
            self._sample = [(features[kept], values[kept], hashes[kept])]
            self._sampled = len(kept)

    def _keep_top(self, entries: Entries, around: Entries) -> None:
        """Merge the batch into the top-k lists: one example per document; the earlier token wins a tie."""
        found = (entries.values > self.top_value[entries.features, -1]).nonzero().squeeze(1)
        if not len(found):
            return
        new = entries.take(found)
        touched = new.features.unique()
        slot = (self.top_value[touched] > -torch.inf).nonzero()  # (n_old, 2)
        at, place = touched[slot[:, 0]], slot[:, 1]
        old = Entries(at, self.top_token[at, place], self.top_doc[at, place], self.top_value[at, place])
        both = Entries(*(torch.cat(pair) for pair in zip(old, new, strict=True)))
        order = _sort_by(both.features, -both.values)  # stable: old before new, earlier token before later
        order = order[_first_of_each(both.features[order], both.docs[order])]
        rank = _rank(both.features[order])
        order, rank = order[rank < self.top_k], rank[rank < self.top_k]
        windows = torch.zeros(len(order), _WINDOW)
        is_old = order < len(at)
        windows[is_old] = self.top_window[at[order[is_old]], place[order[is_old]]]
        windows[~is_old] = self._windows(around, both.take(order[~is_old]))
        chosen = both.take(order)
        self.top_value[touched] = -torch.inf
        self.top_value[chosen.features, rank] = chosen.values
        self.top_token[chosen.features, rank] = chosen.tokens
        self.top_doc[chosen.features, rank] = chosen.docs
        self.top_window[chosen.features, rank] = windows

    def _windows(self, entries: Entries, peaks: Entries) -> Float[Tensor, "n window"]:
        """Values of each peak's feature from 32 tokens before the peak to 16 after it, within its context."""
        first = int(entries.tokens.min())
        span = int(entries.tokens.max()) - first + 1
        keys = entries.features * span + entries.tokens - first  # ascending
        start_of_context = peaks.tokens - peaks.tokens % self.ctx_len
        start = torch.maximum(peaks.tokens - WINDOW_LEFT, start_of_context).clamp_min(first)
        stop = torch.minimum(peaks.tokens + WINDOW_RIGHT, start_of_context + self.ctx_len - 1)
        stop = stop.clamp_max(first + span - 1)
        low = torch.searchsorted(keys, peaks.features * span + start - first)
        high = torch.searchsorted(keys, peaks.features * span + stop - first, right=True)
        count = high - low
        peak = torch.repeat_interleave(torch.arange(len(count)), count)
        entry = torch.arange(len(peak)) - torch.repeat_interleave(count.cumsum(0) - count, count) + low[peak]
        windows = torch.zeros(len(count), _WINDOW)
        windows[peak, entries.tokens[entry] - peaks.tokens[peak] + WINDOW_LEFT] = entries.values[entry]
        return windows

    def quantile(self, q: float) -> tuple[Float[Tensor, " d_sae"], Tensor]:
        """The `q` quantile of each feature's kept values (linear interpolation; NaN without any), and whether all its values
        were kept."""
        result = torch.full((self.d_sae,), torch.nan, dtype=torch.float64)
        if not self._sampled:
            return result, torch.ones(self.d_sae, dtype=torch.bool)
        features, values, _ = (torch.cat(tensors) for tensors in zip(*self._sample, strict=True))
        order = _sort_by(features, values)
        values = values[order].double()
        count = torch.bincount(features, minlength=self.d_sae)
        start = count.cumsum(0) - count
        place = (count - 1).clamp_min(0).double() * q
        low = (start + place.floor().long()).clamp_max(len(values) - 1)
        high = (start + place.ceil().long()).clamp_max(len(values) - 1)
        between = torch.lerp(values[low], values[high], place - place.floor())
        return torch.where(count > 0, between, result), count == self.n_fired


def token_hash(tokens: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """A fixed pseudo-random int64 for each token number (splitmix64)."""
    x = tokens * -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of an int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _sort_by(first: Tensor, second: Tensor) -> Tensor:
    """Indices that sort by `first`, then `second`; stable."""
    order = torch.argsort(second, stable=True)
    return order[torch.argsort(first[order], stable=True)]


def _rank(groups: Tensor) -> Tensor:
    """Position of each element within its run of equal consecutive `groups`."""
    index = torch.arange(len(groups))
    starts = torch.ones(len(groups), dtype=torch.bool)
    starts[1:] = groups[1:] != groups[:-1]
    return index - torch.cummax(torch.where(starts, index, 0), 0).values


def _first_of_each(features: Tensor, docs: Tensor) -> Tensor:
    """Ascending indices of the first element of every (feature, document) pair."""
    order = _sort_by(features, docs)
    key = features[order] * (docs.max() + 1) + docs[order]
    return order[_rank(key) == 0].sort().values
