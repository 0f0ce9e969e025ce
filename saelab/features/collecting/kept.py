"""`Kept`: the best few examples of every group, with bounded memory, whatever the order in which they come.

The strongest examples of a feature, a uniform sample of its firings and its nearest misses are all of this kind: they differ in
what ranks an example. Candidates wait in a buffer, and are sorted into the groups when it is full; a candidate that is no better
than the k-th best of its group is dropped at once, so the work per batch shrinks as the pass goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.features.collecting.entries import Entries, rank_in_group, sort_by
from saelab.features.collecting.windows import Windows, joined, windows_around

_WAITING = 1 << 18
"""Candidates that wait at most, or a quarter of what is kept, if that is more."""


class Examples(NamedTuple):
    """Some examples, sorted by group and then from best to worst."""

    group: Int[Tensor, " n"]
    rank: Int[Tensor, " n"]
    """The larger, the better."""
    token: Int[Tensor, " n"]
    doc: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    windows: Windows

    def take(self, index: Tensor) -> Examples:
        *columns, windows = self
        return Examples._make([*(column[index] for column in columns), windows.take(index)])

    def of(self, group: int) -> Examples:
        """Those of one group."""
        low, high = torch.searchsorted(self.group, torch.tensor([group, group + 1])).tolist()
        return self.take(torch.arange(low, high))


class Kept:
    """The `k` examples of largest rank of each of `n_groups` groups; an equal rank goes to the earlier token.

    With `one_per_document` a group keeps one example of each document, that of largest rank.
    """

    def __init__(self, n_groups: int, k: int, ctx_len: int, *, one_per_document: bool = False) -> None:
        self.n_groups, self.k, self.ctx_len, self.one_per_document = n_groups, k, ctx_len, one_per_document
        self._floor = torch.full((n_groups,), torch.iinfo(torch.int64).min)  # rank of the k-th best
        none = torch.zeros(0, dtype=torch.int64)
        self._batches = [Examples(none, none, none, none, torch.zeros(0), Windows.none())]
        self._n_waiting = 0

    def offer(self, groups: Tensor, ranks: Tensor, entries: Entries, around: Entries) -> None:
        """Candidates of one batch: entry i in group `groups[i]` at rank `ranks[i]`; windows show the values of `around`."""
        found = (ranks > self._floor[groups]).nonzero().squeeze(1)
        if not len(found):
            return
        new = entries.take(found)
        windows = windows_around(around, new.features, new.tokens, self.ctx_len)
        self._batches.append(Examples(groups[found], ranks[found], new.tokens, new.docs, new.values, windows))
        self._n_waiting += len(found)
        if self._n_waiting > max(_WAITING, len(self._batches[0].group) // 4):
            self._sort()

    def merge(self, other: Kept) -> None:
        """Add what another one kept of other tokens."""
        self._batches += other._batches
        self._sort()

    @property
    def examples(self) -> Examples:
        """All that are kept."""
        self._sort()
        return self._batches[0]

    def _sort(self) -> None:
        if len(self._batches) == 1:
            return
        *columns, windows = zip(*self._batches, strict=True)
        everything = Examples._make([*(torch.cat(column) for column in columns), joined(list(windows))])
        order = torch.argsort(everything.token, stable=True)
        order = order[sort_by(everything.group[order], ~everything.rank[order])]
        if self.one_per_document:
            order = order[_first_of_each(everything.group[order], everything.doc[order])]
        place = rank_in_group(everything.group[order])
        order, place = order[place < self.k], place[place < self.k]
        kept = everything.take(order)
        last = place == self.k - 1
        self._floor[kept.group[last]] = kept.rank[last]
        self._batches, self._n_waiting = [kept], 0

    def tensors(self) -> dict[str, Tensor]:
        """What is kept, as tensors for a file."""
        *columns, windows = self.examples
        names = ("group", "rank", "token", "doc", "value", "counts", "columns", "values")
        return dict(zip(names, (*columns, *windows), strict=True))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` returned."""
        columns = [tensors[name] for name in ("group", "rank", "token", "doc", "value")]
        windows = Windows(*(tensors[name] for name in ("counts", "columns", "values")))
        self._batches = [*self._batches, Examples._make([*columns, windows])]
        self._sort()


def _first_of_each(groups: Tensor, docs: Tensor) -> Tensor:
    """Ascending indices of the first element of every (group, document) pair."""
    order = sort_by(groups, docs)
    pairs = torch.stack([groups[order], docs[order]])
    new = torch.ones(len(order), dtype=torch.bool)
    new[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(0)
    return order[new].sort().values
