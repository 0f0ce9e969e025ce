"""The contexts that a model reads: documents packed one after another, or one document per context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from saelab.tokens.documents import Document
from saelab.tokens.texts import TokenBatch, pack
from saelab.tokens.tokenizing import Bos, eos_and_start, tokenized

PACKED = "EOS between documents, attention not reset"
UNPACKED = "each document in a context of its own, cut where that ends"


def contexts(
    documents: Iterable[Document],
    lm: Any,
    ctx_len: int,
    batch_size: int,
    prepend_bos: Bos = None,
    packing: str = PACKED,
    n_tokens: int | None = None,
    on_document: Callable[[int, Document], None] | None = None,
) -> Iterator[TokenBatch]:
    """Contexts of `ctx_len` tokens, `batch_size` at a time, up to the one that holds the last of `n_tokens` tokens.

    `packing` is `PACKED` (see `tokens.pack`, also for `on_document` and errors) or `UNPACKED`, one document per context: the
    rest of its context is padding, EOS with `doc` -1.
    """
    read = pack if packing == PACKED else _one_per_context
    batches = read(documents, lm, ctx_len, batch_size, prepend_bos, on_document)
    return batches if n_tokens is None else _first_tokens(batches, n_tokens)


def _one_per_context(
    documents: Iterable[Document],
    lm: Any,
    ctx_len: int,
    batch_size: int,
    prepend_bos: Bos,
    on_document: Callable[[int, Document], None] | None,
) -> Iterator[TokenBatch]:
    eos, start = eos_and_start(lm, ctx_len, batch_size, prepend_bos)
    rows, first = tokenized(documents, lm, start, eos, on_document), 0
    while some := [(start + ids)[:ctx_len] for ids in islice(rows, batch_size)]:
        ids = torch.full((len(some), ctx_len), eos)
        doc = torch.full_like(ids, -1)
        for i, row in enumerate(some):
            ids[i, : len(row)] = torch.tensor(row)
            doc[i, : len(row)] = first + i
        yield TokenBatch(ids, doc, first)
        first += len(some)


def _first_tokens(batches: Iterator[TokenBatch], n_tokens: int) -> Iterator[TokenBatch]:
    """The contexts that hold the first `n_tokens` tokens, in batches; no batch is read ahead."""
    missing = n_tokens
    for batch in batches:
        before = (batch.doc >= 0).sum(1).cumsum(0)  # tokens up to the end of each context
        n = int((before < missing).sum()) + 1
        missing -= int(before[-1])
        yield replace(batch, ids=batch.ids[:n], doc=batch.doc[:n])
        if missing <= 0:
            return
