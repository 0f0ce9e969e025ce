"""Which token each row of a cache's batches is: its document, and its place in it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.activation_cache.reader import ActivationCache


def row_labels(
    cache: ActivationCache, leave_out: int, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[Int[Tensor, "batch 2"]]:
    """Endlessly, for the rows of `cache.batches` with the same arguments: the document's id, and the token's distance from the
    document's first token in the packed contexts."""
    document, place = _tokens(cache)
    waiting = torch.zeros(0, 2, dtype=torch.int64)
    for shard, order in cache.plan(seed, start_step * batch_size, leave_out):
        index = cache.index(shard)
        at = index["seq"][order].long(), index["pos"][order].long()
        waiting = torch.cat([waiting, torch.stack([document[at], place[at]], 1)])
        while len(waiting) >= batch_size:
            yield waiting[:batch_size]
            waiting = waiting[batch_size:]


def _tokens(cache: ActivationCache) -> tuple[Int[Tensor, "n_contexts ctx_len"], Int[Tensor, "n_contexts ctx_len"]]:
    """The id of each token's document, and its place in it; both mean nothing on padding."""
    document = cache.tokens()[1].long().clamp_min(0)
    number = torch.arange(document.numel())
    first = torch.full_like(cache.document_ids, document.numel())
    first.scatter_reduce_(0, document.flatten(), number, "amin")
    return cache.document_ids[document], number.view_as(document) - first[document]
