"""Training rows together with the contexts that they stand in, for an SAE that is trained inside its model (`finetune.py`).

A batch is a number of whole contexts: the activations at the SAE's hook that its mask keeps, and what the model, unedited,
predicts there. The contexts are those of the texts in blocks of 1,024, each block in an order of its own that depends on (seed,
number of the block) alone, so that a step's contexts follow from its number. Every sixteenth context is held out, for thresholds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.activation_cache.layout import seeded
from saelab.losses import log_probs
from saelab.models.differentiable import differentiable_activations, differentiable_logits
from saelab.models.language_model import LanguageModel
from saelab.models.prompts import Batch
from saelab.tokens import Texts, TokenBatch, document_id
from saelab.tokens.documents import Document
from saelab.tokens.mask import Mask
from saelab.tokens.packing import contexts
from saelab.training.kept_out import ENOUGH, LARGEST_SHARE

_LOG = logging.getLogger("saelab")

BLOCK = 1024


@dataclass(frozen=True, eq=False)
class ContextRows(Mapping[str, Tensor]):
    """A batch: the rows of one hook by its name, and their contexts."""

    hook_name: str
    x: Float[Tensor, "n_kept d_in"]
    ids: Int[Tensor, "n ctx_len"]
    keep: Bool[Tensor, "n ctx_len"]
    """The tokens whose rows are in `x`, in order."""
    scored: Bool[Tensor, "n ctx_len"]
    """Those of them that a token follows."""
    log_probs: Float[Tensor, "n_scored vocab"] | None
    """What the model predicts behind them; None if that was not asked for."""

    def __getitem__(self, name: str) -> Tensor:
        if name != self.hook_name:
            raise KeyError(name)
        return self.x

    def __iter__(self) -> Iterator[str]:
        return iter((self.hook_name,))

    def __len__(self) -> int:
        return 1

    @property
    def batch(self) -> Batch:
        """The tokens as the model reads them. Padding, which is on the right only, is read too, and never looked at."""
        return as_batch(self.ids)

    def part(self, chosen: slice) -> ContextRows:
        """These contexts alone."""
        first, last = slice(0, chosen.start), slice(0, chosen.stop)
        rows = slice(int(self.keep[first].sum()), int(self.keep[last].sum()))
        scored = slice(int(self.scored[first].sum()), int(self.scored[last].sum()))
        predicted = None if self.log_probs is None else self.log_probs[scored]
        ids, keep = self.ids[chosen], self.keep[chosen]
        return ContextRows(self.hook_name, self.x[rows], ids, keep, self.scored[chosen], predicted)


@dataclass
class Watch:
    """An edit that changes nothing, and holds the activations at its hook."""

    hook_name: str
    x: Tensor = field(default_factory=lambda: torch.zeros(0))
    first_token: ClassVar[bool] = True

    def apply(self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]) -> Tensor:
        """`x` itself."""
        self.x = x
        return x


def as_batch(ids: Int[Tensor, "n ctx_len"]) -> Batch:
    """Contexts as the model reads them."""
    return Batch(ids, torch.arange(ids.shape[1]).expand_as(ids))


@dataclass
class Contexts:
    """The contexts of texts, and the rows of one hook in them."""

    lm: LanguageModel
    texts: Texts
    split: str
    hook_name: str
    mask: Mask
    ctx_len: int
    prepend_bos: bool | list[int]
    packing: str
    predicts: bool
    """Whether batches hold what the model predicts."""
    _documents: list[int] = field(default_factory=list)

    @property
    def documents(self) -> Int[Tensor, " n_documents"]:
        """Ids of the documents read so far."""
        return torch.tensor(self._documents, dtype=torch.int64)

    @property
    def has_held_out(self) -> bool:
        """Whether there are enough contexts to hold some out."""
        first = next(self._blocks(LARGEST_SHARE), None)
        self._documents.clear()
        return first is not None and len(first.ids) == LARGEST_SHARE

    def batches(self, hook_names: Sequence[str], batch_size: int, seed: int, start_step: int) -> Iterator[ContextRows]:
        """Batches of `batch_size` tokens from a step on, endlessly."""
        n = batch_size // self.ctx_len
        skip, number = start_step * n, 0
        ids = doc = torch.zeros(0, self.ctx_len, dtype=torch.int64)
        while True:
            for block in self._blocks():
                trained = (~_held_out(block)).nonzero().flatten()
                order = trained[torch.randperm(len(trained), generator=seeded("contexts", seed, number))][skip:]
                skip, number = max(0, skip - len(trained)), number + 1
                ids, doc = torch.cat([ids, block.ids[order]]), torch.cat([doc, block.doc[order]])
                while len(ids) >= n:
                    yield self._rows(ids[:n], doc[:n], self.predicts)
                    ids, doc = ids[n:], doc[n:]

    def kept_out(self, hook_names: Sequence[str]) -> dict[str, Tensor]:
        """Rows of the contexts that no batch holds, 8,192 if there are as many."""
        _LOG.info("Reading contexts that were held out of training.")
        found = [torch.zeros(0)]
        for block in self._blocks():
            held_out = _held_out(block)
            for ids, doc in zip(block.ids[held_out].split(8), block.doc[held_out].split(8), strict=True):
                found.append(self._rows(ids, doc, predicts=False).x)
                if sum(map(len, found)) >= ENOUGH:
                    return {self.hook_name: torch.cat(found[1:])[:ENOUGH]}
        return {self.hook_name: torch.cat(found[1:])}

    def _blocks(self, size: int = BLOCK) -> Iterator[TokenBatch]:
        """All contexts once, in the order of the texts."""

        def note(index: int, document: Document) -> None:
            if index == len(self._documents):
                self._documents.append(document_id(document))

        documents = self.texts.documents(self.split, self.lm)
        return contexts(documents, self.lm, self.ctx_len, size, self.prepend_bos, self.packing, on_document=note)

    def _rows(self, ids: Int[Tensor, "n ctx_len"], doc: Int[Tensor, "n ctx_len"], predicts: bool) -> ContextRows:
        watch, name = Watch(self.hook_name), self.hook_name
        logits = differentiable_logits(self.lm, as_batch(ids), [watch]) if predicts else None
        x = watch.x if predicts else differentiable_activations(self.lm, as_batch(ids), [name])[name]
        keep = self.mask.apply(TokenBatch(ids, doc, 0), {name: x})[0]
        follows = torch.cat([doc[:, 1:] >= 0, torch.zeros(len(doc), 1, dtype=torch.bool)], dim=1)
        scored = keep & follows
        predicted = None if logits is None else log_probs(logits[scored.to(x.device)])
        return ContextRows(name, x[keep.to(x.device)], ids, keep, scored, predicted)


def _held_out(block: TokenBatch) -> Bool[Tensor, " n"]:
    """Every sixteenth context of the texts."""
    return (block.first_context + torch.arange(len(block.ids))) % LARGEST_SHARE == LARGEST_SHARE - 1
