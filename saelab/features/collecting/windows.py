"""Feature activations around a token: those within a window of its context, stored sparsely.

A window is copied when its token is admitted as an example, so no second pass over the text is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.features.collecting.entries import Entries
from saelab.features.schema import WINDOW_LEFT, WINDOW_RIGHT

WIDTH = WINDOW_LEFT + 1 + WINDOW_RIGHT


class Windows(NamedTuple):
    """The windows of several examples: `counts[i]` values of example i, one example after another."""

    counts: Int[Tensor, " n"]
    columns: Int[Tensor, " total"]
    """Column of each value; `WINDOW_LEFT` is the example's token."""
    values: Float[Tensor, " total"]

    @classmethod
    def none(cls) -> Windows:
        return cls(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.uint8), torch.zeros(0))

    def take(self, index: Int[Tensor, " m"]) -> Windows:
        """The windows of these examples, in this order."""
        starts = self.counts.cumsum(0) - self.counts
        inside = _expanded(starts[index], self.counts[index])
        return Windows(self.counts[index], self.columns[inside], self.values[inside])

    def dense(self) -> Float[Tensor, "n width"]:
        rows = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts.long())
        result = torch.zeros(len(self.counts), WIDTH)
        result[rows, self.columns.long()] = self.values
        return result


def joined(several: list[Windows]) -> Windows:
    """The windows of several groups of examples, one group after another."""
    return Windows(*(torch.cat(columns) for columns in zip(*several, strict=True))) if several else Windows.none()


def windows_around(entries: Entries, features: Tensor, tokens: Tensor, ctx_len: int) -> Windows:
    """Values of feature `features[i]` from 32 tokens before `tokens[i]` to 16 after it, within its context.

    `entries` are those of the batch, sorted by feature and token; the tokens may be such on which the feature is silent.
    """
    if not len(entries.tokens) or not len(tokens):
        return Windows.none()._replace(counts=torch.zeros(len(tokens), dtype=torch.int32))
    first = int(torch.minimum(entries.tokens.min(), tokens.min()))
    span = int(torch.maximum(entries.tokens.max(), tokens.max())) - first + 1
    keys = entries.features * span + entries.tokens - first  # ascending
    start_of_context = tokens - tokens % ctx_len
    start = torch.maximum(tokens - WINDOW_LEFT, start_of_context).clamp_min(first)
    stop = torch.minimum(tokens + WINDOW_RIGHT, start_of_context + ctx_len - 1).clamp_max(first + span - 1)
    low = torch.searchsorted(keys, features * span + start - first)
    high = torch.searchsorted(keys, features * span + stop - first, right=True)
    counts = high - low
    inside = _expanded(low, counts)
    columns = entries.tokens[inside] - torch.repeat_interleave(tokens, counts) + WINDOW_LEFT
    return Windows(counts.int(), columns.to(torch.uint8), entries.values[inside])


def _expanded(starts: Tensor, counts: Tensor) -> Tensor:
    """The integers from `starts[i]` to `starts[i] + counts[i] - 1`, for every i in turn."""
    starts, counts = starts.long(), counts.long()
    before = torch.repeat_interleave(starts - (counts.cumsum(0) - counts), counts)
    return before + torch.arange(len(before))
