"""Texts to token ids: where documents come from, which of them are held out, and how they are packed into contexts.

Documents are packed one after another with an EOS between them; attention is not reset, and every token keeps the index
of its document. Each context begins with what the tokenizer puts in front of a text (usually BOS or nothing), unless
`prepend_bos` says otherwise. A control token spelled out in a text (`<|im_start|>`) becomes that control token, as chat
templates require; the mask leaves special tokens out everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelab.tokens.documents import SPLITS, Document, check_split, column_value, document_id, is_held_out, token_ids
from saelab.tokens.hf_datasets import open_hub
from saelab.tokens.sources import Source, open_named, open_source
from saelab.tokens.tokenizing import Bos, eos_and_start, render, tokenized

__all__ = ["Texts", "TokenBatch", "check_split", "document_id", "is_held_out", "load_texts", "pack"]


class Texts:
    """A source of documents that can be read repeatedly, in the same order.

    `spec` is what `load_texts` needs to reopen it (JSON-serialisable), `name` a short label for messages.
    """

    def __init__(self, source: Source, chat: Any = None):
        self._source, self._chat = source, chat
        self.name: str = source.name
        self.spec: dict[str, Any] = source.spec | ({} if chat is None else {"chat": _template_hash(chat)})
        self._fingerprint: str | None = None
        self._first: dict[str, Any] = next(source.rows(None), {})
        self._check()

    def __repr__(self) -> str:
        return f"Texts({self.name!r}, column {self._source.column!r})"

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], chat: Any = None) -> Texts:
        """Open the texts that `spec` describes; `chat` (a language model) is used only where the spec has a template.

        Raises `ValueError` for strings that were only in memory, and if the chat template differs.
        """
        template = spec.get("chat")
        if template is not None and (chat is None or _template_hash(chat) != template):
            raise ValueError(
                f"the texts {spec['source']!r} were rendered with a chat template: give the language model that has it "
                f"(SHA-256 {template[:12]}...) as chat=lm."
            )
        return cls(_reopen(spec), None if template is None else chat)

    def documents(self, split: str = "all", lm: Any = None) -> Iterator[Document]:
        """Documents of `split` ("train", "held_out" or "all") in order, texts or lists of token ids; empty ones are skipped.

        Raises `ValueError` for an unknown split, for token ids known to come from a tokenizer other than that of `lm`,
        and, when reached, for a row that holds neither.
        """
        check_split(split)
        made_by = self._source.tokenizer_hash or self._first.get("tokenizer_hash")
        if lm is not None and made_by and made_by != lm.tokenizer_hash:
            raise ValueError(
                f"The token ids of {self.name} come from the tokenizer {str(made_by)[:12]}, but {lm.name} has "
                f"{lm.tokenizer_hash[:12] or 'none'}. Give the texts, or a model with the tokenizer of these ids."
            )
        return self._documents(split)

    def _documents(self, split: str) -> Iterator[Document]:
        column = self._source.column
        beside = [name for name in ("attention_mask", "tokenizer_hash") if name in self._first and name != column]
        for number, row in enumerate(self._source.rows([column, *beside])):
            if row.get("tokenizer_hash") != self._first.get("tokenizer_hash"):
                raise ValueError(
                    f"row {number} of {self.name} has a different tokenizer_hash from the first: give one source for each."
                )
            document = self._document(row, number)
            if document and (split == "all" or is_held_out(document) == (split == "held_out")):
                yield document

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row with all its columns (for example topic, word, concept), empty ones included."""
        return self._source.rows(None)

    def fingerprint(self) -> str:
        """SHA-256 over what determines the documents (the file's bytes; a hub dataset's id, config, split, commit)."""
        if self._fingerprint is None:
            known = f"{self._source.content_hash()}\n{self._source.column}\n{self.spec.get('chat')}"
            self._fingerprint = hashlib.sha256(known.encode()).hexdigest()
        return self._fingerprint

    def describe(self, split: str) -> str:
        """One line for messages: the source and which of its documents `split` selects."""
        check_split(split)
        return f"{self.name}, split {split!r} ({SPLITS[split]})"

    def _document(self, row: Mapping[str, Any], number: int) -> Document:
        value = column_value(row, self._source.column, f"row {number} of {self.name}")
        if value is None or isinstance(value, str):
            return value or ""
        if token_ids(value) is not None:
            return value
        if self._chat is not None and isinstance(value, list | tuple):
            try:
                return render(self._chat.tokenizer, value)
            except Exception as error:  # a template may raise anything
                said = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"row {number} of {self.name} cannot be rendered with the chat template ({type(error).__name__}: {said}): "
                    "change or remove that row."
                ) from error
        fix = "give load_texts(..., chat=lm) to render messages" if isinstance(value, list) else "make it a string"
        raise ValueError(
            f"row {number} of {self.name} holds {repr(value)[:60]} ({type(value).__name__}), neither a string nor a list "
            f"of token ids: {fix}."
        )

    def _check(self) -> None:
        column, first = self._source.column, self._first
        if first and column not in first:
            raise ValueError(
                f"{self.name} has no column {column!r}; its columns are {', '.join(map(str, first))}. "
                f"Give column=one of these."
            )
        if next(self._documents("all"), None) is None:
            raise ValueError(f"{self.name} holds no text at all (column {column!r}): give a source with text in it.")


def load_texts(
    source: Any,
    column: str = "text",
    *,
    config: str | None = None,
    hub_split: str | None = None,
    revision: str | None = None,
    chat: Any = None,
) -> Texts:
    """Open a source of documents, which are texts or lists of token ids.

    `source`: "demo" or "concepts" (built in); a .parquet, .jsonl, .csv or .txt file, or a folder of `save_to_disk`; a
    Hugging Face dataset id, streamed (`config`, `hub_split`, `revision` apply to it); a `Dataset`, `DatasetDict` (with
    `hub_split`, if it has several), DataFrame or dict of columns; an iterable of strings, of token-id lists or of rows,
    read once into memory; a `Texts`; its `spec`. `column` holds the texts ("input_ids" if rows have no "text"): a column
    `attention_mask` hides padding, a column `tokenizer_hash` (or Parquet metadata of that name) is compared with the
    model's. With `chat=lm`, rows are lists of messages, rendered with its chat template.
    A .txt file is split into documents at blank lines once a document has 2,000 characters, at any line end after 8,000.

    Raises `ValueError` naming the source, what is wrong with it and the fix.
    """
    if isinstance(source, Texts):
        return source
    if isinstance(source, Mapping) and isinstance(source.get("source"), str) and "column" in source:
        return Texts.from_spec(source, chat)
    by_id = lambda name: open_hub(name, column, config, hub_split or "train", revision)  # noqa: E731
    return Texts(open_source(source, column, hub_split, by_id), chat)


def _reopen(spec: Mapping[str, Any]) -> Source:
    if spec["source"] == "strings":
        raise ValueError(
            f"these texts were {spec['n']} strings in memory (SHA-256 {spec['sha256'][:12]}...) and were not saved: "
            f"give the texts themselves."
        )
    if "hub_split" in spec:
        return open_hub(spec["source"], spec["column"], spec["config"], spec["hub_split"], spec["revision"])
    return open_named(spec["source"], spec["column"], spec.get("folder_split"))


def _template_hash(chat: Any) -> str:
    if getattr(chat.tokenizer, "chat_template", None) is None:
        raise ValueError(
            "chat= was given, but its tokenizer has no chat template: give texts as strings, without chat=."
        )
    return hashlib.sha256(str(chat.tokenizer.chat_template).encode()).hexdigest()


@dataclass(frozen=True)
class TokenBatch:
    """Consecutive packed contexts."""

    ids: Int[Tensor, "n ctx_len"]
    """Token ids, int64."""
    doc: Int[Tensor, "n ctx_len"]
    """Index of each token's document among the documents seen so far, -1 on padding; an EOS belongs to the document it ends."""
    first_context: int
    """Number of the first context, counted from the start of the stream."""


def pack(
    documents: Any,
    lm_or_tokenizer: Any,
    ctx_len: int,
    batch_size: int,
    prepend_bos: Bos = None,
    on_document: Callable[[int, Document], None] | None = None,
) -> Iterator[TokenBatch]:
    """Pack documents into contexts of `ctx_len` tokens and yield them `batch_size` at a time (fewer in the last batch).

    Streaming and deterministic: EOS between documents, no token lost; only the last context is padded, with EOS and
    `doc` -1. Every context begins with `tokenizing.context_start(lm_or_tokenizer, prepend_bos)` (counted as part of the document
    that follows, and dropped from a document that begins with it itself). `on_document(index, document)` is called for each in
    order, before the first batch that holds one of its tokens; documents are read ahead, so some may never reach a batch.

    Raises `ValueError` for anything but a list or iterator of documents, sizes below 1 (2 with BOS), a tokenizer without EOS
    or BOS, and texts without a tokenizer.
    """
    eos, start = eos_and_start(lm_or_tokenizer, ctx_len, batch_size, prepend_bos)
    return _pack(tokenized(documents, lm_or_tokenizer, start, eos, on_document), ctx_len, batch_size, eos, start)


def _pack(
    tokenized: Iterable[list[int]], ctx_len: int, batch_size: int, eos: int, start: list[int]
) -> Iterator[TokenBatch]:
    body = ctx_len - len(start)
    ids_parts, doc_parts, waiting, first_context = [], [], 0, 0
    for index, ids in enumerate(tokenized):
        row = np.array(ids if index == 0 else [eos, *ids], dtype=np.int64)
        doc = np.full(len(row), index)
        if index:
            doc[0] = index - 1
        ids_parts.append(row)
        doc_parts.append(doc)
        waiting += len(row)
        while waiting >= body * batch_size:
            all_ids, all_doc = np.concatenate(ids_parts), np.concatenate(doc_parts)
            cut = body * batch_size
            yield _batch(all_ids[:cut], all_doc[:cut], body, start, first_context)
            first_context += batch_size
            ids_parts, doc_parts, waiting = [all_ids[cut:]], [all_doc[cut:]], waiting - cut
    if waiting:
        padding = (0, -waiting % body)
        all_ids = np.pad(np.concatenate(ids_parts), padding, constant_values=eos)
        all_doc = np.pad(np.concatenate(doc_parts), padding, constant_values=-1)
        yield _batch(all_ids, all_doc, body, start, first_context)


def _batch(ids: np.ndarray, doc: np.ndarray, body: int, start: list[int], first_context: int) -> TokenBatch:
    ids, doc = ids.reshape(-1, body), doc.reshape(-1, body)
    if start:
        ids = np.concatenate([np.tile(np.array(start), (len(ids), 1)), ids], axis=1)
        doc = np.concatenate([np.repeat(doc[:, :1], len(start), axis=1), doc], axis=1)
    return TokenBatch(torch.from_numpy(ids.copy()), torch.from_numpy(doc.astype(np.int64)), first_context)
