"""Training rows straight from a language model: harvested and shuffled in memory during training, with nothing on disk.

The rows of an epoch are those of the cache that `harvest` would make from all the texts, in the order of its shards: contexts
go through the model in order, rows wait in the shuffle buffer, and each draw depends only on (seed, draw number). The
contents of the buffer are determined by the token ids, so a resume replays ids only, up to the draw it needs, and runs the model
on the contexts that have rows in the buffer at that point. Which rows the norm rule drops is known only after running the
model: such a row keeps its place, and its replacement row is the one drawn before it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.activation_cache import layout
from saelab.activation_cache.checks import check_arguments, finite_norms, refuse_steered, warn_if_none_held_out
from saelab.activation_cache.codec import Storage, identity, kept_rows, row_bytes
from saelab.activation_cache.shuffle_buffer import ShuffleBuffer
from saelab.errors import CacheError
from saelab.identity import LATER, of_rows
from saelab.models.hooks import hook_list
from saelab.models.language_model import LanguageModel
from saelab.models.multi_model import hook_keys, names_and_hashes, together
from saelab.tokens import Texts, TokenBatch, document_id, load_texts, pack
from saelab.tokens.documents import Document
from saelab.tokens.mask import NORM_RULE_ROWS, Mask, NormRule
from saelab.tokens.tokenizing import Bos, resolved_bos

_LOG = logging.getLogger("saelab")

_DROPPED = -1  # instead of the token id, in rows that the norm rule drops
_STORAGE = Storage("bfloat16")

Rows = tuple[Int[Tensor, "n 3"], dict[str, dict[str, Tensor]]]
"""(seq, pos, token) of rows, and their stored tensors by hook: the arguments of `ShuffleBuffer.add`."""


def stream(
    lm: LanguageModel | Sequence[LanguageModel],
    texts: Any,
    hook_names: str | Sequence[str],
    ctx_len: int = 256,
    batch_size: int = 16,
    split: str = "train",
    shard_rows: int = 8_192,
    pool_shards: int = 16,
    prepend_bos: Bos = None,
) -> ActivationStream:
    """A source for `saelab.train` in place of a cache: the same rows, computed during training, looping over the texts.

    Arguments are those of `saelab.harvest`; `batch_size` is in contexts. The shuffle buffer holds `shard_rows * pool_shards`
    rows of each hook in memory, in bfloat16. `TrainConfig.seed` seeds the order. Raises `ValueError` for bad arguments.
    """
    hooks = hook_keys(lm := together(lm), hook_names)
    sizes = {"ctx_len": ctx_len, "batch_size": batch_size, "shard_rows": shard_rows, "pool_shards": pool_shards}
    check_arguments(lm, hooks, split, sizes)
    texts = load_texts(texts)
    _LOG.info(f"Streaming {texts.describe(split)} through {lm.name}.")
    warn_if_none_held_out(texts, split, 2)
    config = of_rows(lm, texts, hooks) | identity(_STORAGE.name) | sizes
    del config["logits_probe"]  # its last digits depend on the machine, and a stream's config is compared by its hash
    config |= {"split": split, "prepend_bos": resolved_bos(lm, prepend_bos)}
    return ActivationStream(lm, texts, config, by_default=prepend_bos is None)


class ActivationStream:
    """Made by `stream`. Has the part of the `ActivationCache` interface that training needs.

    The first rows (16,384, for the norm rule) are computed when the norm limits or `stats` are first needed.
    """

    def __init__(self, lm: LanguageModel, texts: Texts, config: Mapping[str, Any], by_default: bool = False):
        self.lm, self.texts, self.config, self._by_default = lm, texts, config, by_default
        self.hook_names: list[str] = list(config["hooks"])
        self.models = names_and_hashes(lm)
        self.buffer_rows: int = config["shard_rows"] * config["pool_shards"]
        self._capacity = self.buffer_rows + config["batch_size"] * config["ctx_len"]
        self._documents: list[int] = []
        self._n_documents = 0

    def __repr__(self) -> str:
        return f"ActivationStream({self.lm.name!r} over {self.texts.name}: {', '.join(self.hook_names)})"

    def by_rules(self, rules: int) -> ActivationStream:
        """The same stream for a run that an earlier version began: under rules 1, contexts had a BOS only on request, and
        before rules 4 the config lacked the entries in `LATER` (tokenizer roles, model config)."""
        config = self.config if rules >= 4 else {key: self.config[key] for key in self.config if key not in LATER}
        bos = {"prepend_bos": False} if rules == 1 and self._by_default else {}
        return ActivationStream(self.lm, self.texts, {**config, **bos}, self._by_default)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the rows and, together with the seed, their order."""
        return layout.config_hash(self.config)

    @property
    def held_bytes(self) -> int:
        """Bytes of memory for the full shuffle buffer, the first rows and one draw."""
        widths, n_rows = self.config["hooks"].values(), self._capacity + NORM_RULE_ROWS + self.config["shard_rows"]
        return n_rows * (layout.INDEX_BYTES + sum(row_bytes(_STORAGE.name, width) for width in widths))

    @property
    def document_ids(self) -> Int[Tensor, " n_documents"]:
        """`tokens.document_id` of every document read so far by the last `batches`, in order of appearance."""
        return torch.tensor(self._documents[: self._n_documents], dtype=torch.int64)

    def origin(self, hook_name: str) -> dict[str, Any]:
        """Where a hook's rows come from, for `sae.json`, as `ActivationCache.origin`."""
        model = self.models.get(hook_name.partition("/")[0], {"name": self.lm.name, "hash": self.lm.hash})
        max_norms = self._beginning[0].max_norm or {}
        return layout.origin(self.config, hook_name, model, max_norms[hook_name], self.texts.spec)

    def stats(self, hook_name: str) -> dict[str, Any]:
        """`n`, `mean` and `second_moment` (d_in, fp64) of the first rows that the mask keeps, as they are stored."""
        n, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for index, rows in self._beginning[1].values():
            x = rows[hook_name]["acts"][index[:, 2] != _DROPPED].double()
            n, total, squares = n + len(x), total + x.sum(0), squares + x.square().sum(0)
        return {"n": n, "mean": total / n, "second_moment": squares / n}

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        start_step: int = 0,
        hook_name: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Generator[dict[str, Float[Tensor, "batch d_in"]], None, None]:
        """Endless shuffled batches by hook, a pure function of (stream, seed, step); cast from bfloat16 to `dtype`.

        To begin at `start_step`, the texts are tokenised up to there (once for all epochs) and the model runs on the contexts
        that have rows in the buffer. Raises `CacheError` if the model returns non-finite rows.
        """
        hooks = self.hook_names if hook_name is None else hook_list(hook_name)
        waiting: dict[str, Tensor] = {}
        for drawn in self._drawn(seed, start_step * batch_size, hooks):
            waiting = {hook: torch.cat([waiting[hook], x]) for hook, x in drawn.items()} if waiting else drawn
            while len(waiting[hooks[0]]) >= batch_size:
                yield {hook: x[:batch_size].to(dtype) for hook, x in waiting.items()}
                waiting = {hook: x[batch_size:] for hook, x in waiting.items()}

    def _drawn(self, seed: int, skip: int, hooks: list[str]) -> Iterator[dict[str, Tensor]]:
        """The rows of each draw, endlessly, starting with the draw that holds row `skip`, without the rows before it."""
        _ = self._beginning  # raises if the texts leave no row at all
        self._n_documents = number = 0
        live, epoch_rows = False, 0
        while True:
            buffer, read = ShuffleBuffer(self._capacity), deque[TokenBatch]()
            for batch in chain(self._contexts(), [None]):
                if batch is not None:
                    self._n_documents = max(self._n_documents, int(batch.doc.max()) + 1)
                    buffer.add(*(self._rows(batch, hooks) if live else (self._unmasked(batch), {})))
                    read.append(batch)
                while len(buffer) >= (self.buffer_rows if batch is not None else 1):
                    n = min(self.config["shard_rows"], len(buffer))
                    if not live and skip < n:
                        buffer, live = self._filled(buffer, read, hooks), True
                    index, rows = buffer.draw(n, layout.seeded("shard", seed, number))
                    number += 1
                    if live:
                        at = _replacement_rows(index)[skip:]
                        yield {hook: tensors["acts"][at] for hook, tensors in rows.items()}
                    skip, epoch_rows = 0 if live else skip - n, epoch_rows + n
                    _forget(read, buffer)
            if not live and skip >= epoch_rows:  # every epoch has as many draws as the first
                number, skip = number * (1 + skip // epoch_rows), skip % epoch_rows

    def _contexts(self) -> Iterator[TokenBatch]:
        """All packed contexts, one epoch."""

        def note(index: int, document: Document) -> None:
            if index == len(self._documents):
                self._documents.append(document_id(document))

        config = self.config
        documents = self.texts.documents(config["split"], self.lm)
        return pack(
            documents, self.lm, config["ctx_len"], config["batch_size"], config["prepend_bos"], on_document=note
        )

    def _unmasked(self, batch: TokenBatch) -> Int[Tensor, "n 3"]:
        """(seq, pos, token) of the rows that the mask keeps, judging by token ids alone (no norm rule)."""
        keep, _ = Mask(tuple(self.lm.special_ids), None).apply_norms(batch, {})
        seq, pos = keep.nonzero(as_tuple=True)
        return torch.stack([seq + batch.first_context, pos, batch.ids[seq, pos]], dim=1).int()

    def _rows(self, batch: TokenBatch, hooks: list[str]) -> Rows:
        """The rows of `_unmasked`, with those that the norm rule drops marked."""
        mask, first = self._beginning
        index, rows = first.get(batch.first_context) or self._marked(mask, batch, *self._run(batch))
        return index, {hook: rows[hook] for hook in hooks}

    def _run(self, batch: TokenBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Activations and norms of a batch at all hooks, because a row is dropped if its norm is too large at any of them."""
        refuse_steered(self.lm)
        activations = next(iter(self.lm.stream_activations([batch.ids], self.hook_names)))
        kept = "The last training checkpoint is intact."
        return activations, finite_norms(batch, activations, self.config["batch_size"], kept)

    def _marked(
        self, mask: Mask, batch: TokenBatch, activations: Mapping[str, Tensor], norms: Mapping[str, Tensor]
    ) -> Rows:
        index = self._unmasked(batch)
        seq, pos = index[:, 0].long() - batch.first_context, index[:, 1].long()
        keep, _ = mask.apply_norms(batch, norms)
        index[~keep[seq, pos], 2] = _DROPPED
        positions = torch.zeros_like(keep)
        positions[seq, pos] = True
        return index, {hook: _STORAGE.encode(hook, kept_rows(x, positions)) for hook, x in activations.items()}

    @cached_property
    def _beginning(self) -> tuple[Mask, dict[int, Rows]]:
        """The mask, and the rows of the batches that its limits come from, by first context."""
        norm_rule, waiting = NormRule(self.lm.special_ids), []
        for batch in self._contexts():
            activations, norms = self._run(batch)
            waiting.append((batch, activations, norms))
            norm_rule.add(batch, norms)
            if norm_rule.ready:
                break
        if not norm_rule.n_rows:
            raise ValueError(
                f"The mask drops every token of {self.texts.describe(self.config['split'])}: give more text."
            )
        mask = Mask(tuple(self.lm.special_ids), norm_rule.max_norms())
        return mask, {
            batch.first_context: self._marked(mask, batch, activations, norms) for batch, activations, norms in waiting
        }

    def _filled(self, buffer: ShuffleBuffer, read: Sequence[TokenBatch], hooks: list[str]) -> ShuffleBuffer:
        """The same buffer, with the rows filled in alongside their indices."""
        filled, waiting = ShuffleBuffer(self._capacity), self._numbered(buffer.waiting)
        for batch in read:
            start = batch.first_context * self.config["ctx_len"]
            here = waiting[(waiting >= start) & (waiting < start + batch.ids.numel())]
            if len(here):
                index, rows = self._rows(batch, hooks)
                at = torch.searchsorted(self._numbered(index), here)
                filled.add(index[at], {hook: {"acts": tensors["acts"][at]} for hook, tensors in rows.items()})
        return filled

    def _numbered(self, index: Int[Tensor, "n 3"]) -> Int[Tensor, " n"]:
        """Flat position of each row in the token stream."""
        return index[:, 0].long() * self.config["ctx_len"] + index[:, 1]


def _replacement_rows(index: Int[Tensor, "n 3"]) -> Int[Tensor, " n"]:
    """For each drawn row its own place or, if the norm rule drops it, that of its replacement: the last kept row before it."""
    kept = index[:, 2] != _DROPPED
    if not bool(kept.any()):
        raise CacheError(
            f"The norm rule drops all {len(index)} rows of a draw: these texts differ from the first. Train from a cache instead."
        )
    positions = torch.where(kept, torch.arange(len(index)), 0).cummax(0).values
    return positions.clamp_min(int(kept.nonzero()[0]))  # dropped rows at the front have none before them


def _forget(read: deque[TokenBatch], buffer: ShuffleBuffer) -> None:
    """Drop the contexts that no longer have a row in the buffer."""
    oldest = buffer.oldest_context
    while read and (oldest is None or read[0].first_context + len(read[0].ids) <= oldest):
        read.popleft()
