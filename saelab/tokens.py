"""Texts to token ids: where documents come from, which of them are held out, and how they are packed into contexts.

Documents are packed one after the other with an EOS between them; attention is not reset, and every token keeps the
number of its document. The tokenizer adds nothing by itself (no BOS): `prepend_bos=True` puts one at position 0 of each
context. A control token spelled out in a text (`<|im_start|>`) becomes that control token, as chat templates need; the
mask leaves special tokens out everywhere.
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

from saelab.prompts import eos_and_bos, render, tokenized
from saelab.text_sources import Source, open_named, open_source

SPLITS = {
    "train": "the nine tenths of the documents with sha256(text) % 10 != 0",
    "held_out": "the tenth of the documents with sha256(text) % 10 == 0",
    "all": "all documents",
}


def document_id(text: str) -> int:
    """A document's number anywhere: the first 8 bytes of its SHA-256 as a signed, big-endian int64."""
    return int.from_bytes(_digest(text)[:8], "big", signed=True)


def is_held_out(text: str) -> bool:
    """Whether the document belongs to the held-out tenth: SHA-256 of its UTF-8 bytes, as a number, modulo 10 is 0."""
    return int.from_bytes(_digest(text), "big") % 10 == 0


def _digest(text: str) -> bytes:
    # A lone surrogate cannot be written as UTF-8; it must not stop a harvest, so it counts as itself.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class Texts:
    """A source of documents that can be read again and again, in the same order.

    `spec` is what `load_texts` needs to open it again (JSON-able), `name` a short label for printing.
    """

    def __init__(self, source: Source, chat: Any = None):
        self._source, self._chat = source, chat
        self.name: str = source.name
        self.spec: dict[str, Any] = source.spec | ({} if chat is None else {"chat": _template_hash(chat)})
        self._fingerprint: str | None = None
        self._check()

    def __repr__(self) -> str:
        return f"Texts({self.name!r}, column {self._source.column!r})"

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], chat: Any = None) -> Texts:
        """Open the texts that `spec` describes; `chat` (a language model) is used only where the spec has a template.

        Raises `ValueError` for strings that were only in memory, and when the chat template is another one.
        """
        template = spec.get("chat")
        if template is not None and (chat is None or _template_hash(chat) != template):
            raise ValueError(
                f"the texts {spec['source']!r} were rendered with a chat template: give the language model that has it "
                f"(SHA-256 {template[:12]}...) as chat=lm."
            )
        return cls(_reopen(spec), None if template is None else chat)

    def documents(self, split: str = "all") -> Iterator[str]:
        """Documents of `split` ("train", "held_out" or "all") in order; empty ones are skipped.

        Raises `ValueError` for an unknown split, and on reading for a row that holds no string.
        """
        check_split(split)
        return self._documents(split)

    def _documents(self, split: str) -> Iterator[str]:
        for number, row in enumerate(self._source.rows([self._source.column])):
            text = self._text(row.get(self._source.column), number)
            if text and (split == "all" or is_held_out(text) == (split == "held_out")):
                yield text

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row with all its columns (for example topic, word, concept), the empty ones included."""
        return self._source.rows(None)

    def fingerprint(self) -> str:
        """SHA-256 over what decides the documents (the file's bytes; a hub dataset's id, config, split, commit)."""
        if self._fingerprint is None:
            known = f"{self._source.content_hash()}\n{self._source.column}\n{self.spec.get('chat')}"
            self._fingerprint = hashlib.sha256(known.encode()).hexdigest()
        return self._fingerprint

    def describe(self, split: str) -> str:
        """One line for people: the source and which of its documents `split` takes."""
        check_split(split)
        return f"{self.name}, split {split!r} ({SPLITS[split]})"

    def _text(self, value: Any, number: int) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        if self._chat is not None and isinstance(value, list | tuple):
            try:
                return render(self._chat.tokenizer, value)
            except Exception as error:  # whatever a template, written by anybody, raises
                said = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"row {number} of {self.name} cannot be rendered with the chat template ({type(error).__name__}: {said}): "
                    "change or remove that row."
                ) from error
        fix = "give load_texts(..., chat=lm) to render messages" if isinstance(value, list) else "make it a string"
        raise ValueError(
            f"row {number} of {self.name} holds {repr(value)[:60]} ({type(value).__name__}), not a string: {fix}."
        )

    def _check(self) -> None:
        column = self._source.column
        first = next(self._source.rows(None), None)
        if first is not None and column not in first:
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
    hub_split: str = "train",
    revision: str | None = None,
    chat: Any = None,
) -> Texts:
    """Open a source of documents.

    `source`: "demo" or "concepts" (built in); a .parquet, .jsonl, .csv or .txt file; a Hugging Face dataset id,
    streamed (`config`, `hub_split`, `revision` belong to it); an iterable of strings, read once into memory; a `Texts`;
    its `spec`. `column` is the text's column. With `chat=lm`, rows are lists of messages, for its chat template.
    A .txt file is cut into documents at blank lines once a document has 2,000 characters, at any line end after 8,000.

    Raises `ValueError` naming the source, what is wrong with it and the fix.
    """
    if isinstance(source, Texts):
        return source
    if isinstance(source, Mapping):
        return Texts.from_spec(source, chat)
    return Texts(open_source(source, column, lambda name: _open_hub(name, column, config, hub_split, revision)), chat)


def _reopen(spec: Mapping[str, Any]) -> Source:
    if spec["source"] == "strings":
        raise ValueError(
            f"these texts were {spec['n']} strings in memory (SHA-256 {spec['sha256'][:12]}...) and are not kept "
            f"anywhere: give the texts themselves."
        )
    if "hub_split" in spec:
        return _open_hub(spec["source"], spec["column"], spec["config"], spec["hub_split"], spec["revision"])
    return open_named(spec["source"], spec["column"])


def _open_hub(name: str, column: str, config: str | None, hub_split: str, revision: str | None) -> Source:
    import datasets
    import huggingface_hub

    try:
        # The commit is pinned, so that opening the texts again gives the same documents.
        revision = huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
        data = datasets.load_dataset(name, config, split=hub_split, revision=revision, streaming=True)
    except Exception as error:  # the two libraries share no base class for "not found" and "no network"
        raise ValueError(
            f"{name!r} is no file here and could not be opened as a Hugging Face dataset (config={config!r}, "
            f"hub_split={hub_split!r}, revision={revision!r}): {type(error).__name__}: {error}"
        ) from error
    spec = {"source": name, "column": column, "config": config, "hub_split": hub_split, "revision": revision}
    known = hashlib.sha256(repr(spec).encode()).hexdigest
    return Source(name, spec, column, lambda _: iter(data), known)


def check_split(split: str) -> None:
    """Raise `ValueError` unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist; use one of {', '.join(map(repr, SPLITS))}.")


def _template_hash(chat: Any) -> str:
    if getattr(chat.tokenizer, "chat_template", None) is None:
        raise ValueError(
            "chat= was given, but its tokenizer has no chat template: give texts as strings, without chat=."
        )
    return hashlib.sha256(str(chat.tokenizer.chat_template).encode()).hexdigest()


@dataclass(frozen=True)
class TokenBatch:
    """Some packed contexts in a row."""

    ids: Int[Tensor, "n ctx_len"]
    """Token ids, int64."""
    doc: Int[Tensor, "n ctx_len"]
    """Index of each token's document among the documents seen so far, -1 on padding; an EOS belongs to what it ends."""
    first_sequence: int
    """Number of the first context, counted from the start of the stream."""


def pack(
    documents: Iterable[str],
    lm_or_tokenizer: Any,
    ctx_len: int,
    batch_size: int,
    prepend_bos: bool = False,
    on_document: Callable[[int, str], None] | None = None,
) -> Iterator[TokenBatch]:
    """Pack documents into contexts of `ctx_len` tokens and yield them `batch_size` at a time (fewer in the last batch).

    Streaming and deterministic: EOS between documents, no token lost; only the last context is padded, with EOS and
    `doc` -1. `prepend_bos=True` puts BOS at position 0 of every context (it counts to the document that follows, and a
    BOS that a document begins with is dropped). `on_document(index, text)` is called for each document in order, before
    the first batch that holds a token of it; documents are read a little ahead, so some may never reach a batch.

    Raises `ValueError` for sizes below 1 (2 with BOS) and a tokenizer without EOS or BOS.
    """
    eos, bos = eos_and_bos(lm_or_tokenizer, ctx_len, batch_size, prepend_bos)
    return _pack(tokenized(documents, lm_or_tokenizer, bos, on_document), ctx_len, batch_size, eos, bos)


def _pack(
    tokenized: Iterable[list[int]], ctx_len: int, batch_size: int, eos: int, bos: int | None
) -> Iterator[TokenBatch]:
    body = ctx_len - (bos is not None)
    ids_parts, doc_parts, waiting, first_sequence = [], [], 0, 0
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
            yield _batch(all_ids[:cut], all_doc[:cut], body, bos, first_sequence)
            first_sequence += batch_size
            ids_parts, doc_parts, waiting = [all_ids[cut:]], [all_doc[cut:]], waiting - cut
    if waiting:
        padding = (0, -waiting % body)
        all_ids = np.pad(np.concatenate(ids_parts), padding, constant_values=eos)
        all_doc = np.pad(np.concatenate(doc_parts), padding, constant_values=-1)
        yield _batch(all_ids, all_doc, body, bos, first_sequence)


def _batch(ids: np.ndarray, doc: np.ndarray, body: int, bos: int | None, first_sequence: int) -> TokenBatch:
    ids, doc = ids.reshape(-1, body), doc.reshape(-1, body)
    if bos is not None:
        ids = np.pad(ids, ((0, 0), (1, 0)), constant_values=bos)
        doc = np.concatenate([doc[:, :1], doc], axis=1)
    return TokenBatch(torch.from_numpy(ids.copy()), torch.from_numpy(doc.astype(np.int64)), first_sequence)
