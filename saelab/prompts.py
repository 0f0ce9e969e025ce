"""What a model is given to read (a text, documents, conversations, token ids) turned into token ids and positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.text_sources import without_lone_surrogates

Prompt = str | Sequence[str] | Sequence[int] | Tensor


def to_batch(
    prompt: Prompt, tokenizer: Any, pad_id: int | None
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Token ids, and their positions with -1 on padding (which stands on the right)."""
    if isinstance(prompt, Tensor):
        ids = prompt[None] if prompt.ndim == 1 else prompt
        check_shape(ids)
        return ids, torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    if isinstance(prompt, str):
        rows = [_text_ids(prompt, tokenizer)]
    elif len(prompt) and all(isinstance(entry, str) for entry in prompt):
        rows = [_text_ids(str(text), tokenizer) for text in prompt]
    elif len(prompt) and all(isinstance(entry, int) for entry in prompt):
        rows = [list(prompt)]
    else:
        raise ValueError(f"Got {prompt!r}; expected a text, a non-empty list of texts, or token ids.")
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id or 0, dtype=torch.int64)
    positions = torch.full_like(ids, -1)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        positions[i, : len(row)] = torch.arange(len(row))
    return ids, positions


def check_ids(ids: Tensor, model: str, max_ctx: int, d_vocab: int) -> None:
    """Raises `ValueError` for ids that the model cannot read, naming what is wrong."""
    check_shape(ids)
    if ids.shape[1] > max_ctx:
        raise ValueError(f"{ids.shape[1]} tokens exceed the context of {model}, {max_ctx}; give fewer.")
    low, high = ids.aminmax()
    if low < 0 or high >= d_vocab:
        wrong = int(high) if high >= d_vocab else int(low)
        raise ValueError(f"Token id {wrong} is outside the vocabulary of {model}, 0 to {d_vocab - 1}.")


def check_shape(ids: Tensor) -> None:
    """Raises `ValueError` unless `ids` are whole numbers in a non-empty (batch, seq)."""
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"Token ids are {ids.dtype} {tuple(ids.shape)}; expected a non-empty int64 (batch, seq).")


def _text_ids(text: str, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        raise ValueError("This model has no tokenizer: give token ids, or load_model(model, tokenizer).")
    # a chat template writes BOS out in the text: do not add a second one
    bos = getattr(tokenizer, "bos_token", None)
    ids = tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids if text else []
    if not ids:
        raise ValueError(f"The prompt {text!r} is empty; give at least one token of text.")
    return ids


def render(tokenizer: Any, messages: Sequence[Any]) -> str:
    """A conversation as text, by the tokenizer's chat template. Raises `ValueError` for what are no messages."""
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'{repr(message)[:60]} is no message: expected {{"role": ..., "content": ...}}.')
    return tokenizer.apply_chat_template(list(messages), tokenize=False)


def eos_and_bos(lm_or_tokenizer: Any, ctx_len: int, batch_size: int, prepend_bos: bool) -> tuple[int, int | None]:
    """Ids that end a document and begin a context (None without `prepend_bos`). Raises `ValueError` as `tokens.pack` does."""
    tokenizer = getattr(lm_or_tokenizer, "tokenizer", lm_or_tokenizer)
    eos = getattr(lm_or_tokenizer, "eos_id", None)
    eos = tokenizer.eos_token_id if eos is None else eos
    bos = tokenizer.bos_token_id if prepend_bos else None
    if eos is None:
        raise ValueError("the tokenizer has no EOS token, which separates documents: set tokenizer.eos_token.")
    if prepend_bos and bos is None:
        raise ValueError("prepend_bos=True, but the tokenizer has no BOS token: use prepend_bos=False.")
    if ctx_len < 1 + prepend_bos or batch_size < 1:
        raise ValueError(f"ctx_len={ctx_len}, batch_size={batch_size}: ctx_len needs {1 + prepend_bos}, batch_size 1.")
    return eos, bos


def tokenized(
    documents: Iterable[str], lm_or_tokenizer: Any, bos: int | None, on_document: Callable[[int, str], None] | None
) -> Iterator[list[int]]:
    """Token ids of each document that has any, tokenised many documents at a time; a BOS that it begins with is dropped
    where `bos` is given. `on_document(index, text)` is called before its ids are given."""
    tokenizer, index = getattr(lm_or_tokenizer, "tokenizer", lm_or_tokenizer), 0
    for texts in _groups(documents):
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        readable = [without_lone_surrogates(text) for text in texts]
        encoded = tokenizer(readable, verbose=False, **options)  # not verbose: documents may be longer than the context
        for text, ids in zip(texts, encoded["input_ids"], strict=True):
            ids = ids[1:] if bos is not None and ids[:1] == [bos] else ids
            if ids:
                if on_document is not None:
                    on_document(index, text)
                index += 1
                yield ids


def _groups(documents: Iterable[str], max_documents: int = 64, max_characters: int = 200_000) -> Iterator[list[str]]:
    group: list[str] = []
    for text in documents:
        group.append(text)
        if len(group) == max_documents or sum(map(len, group)) >= max_characters:
            yield group
            group = []
    if group:
        yield group


def special_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Every id the tokenizer marks as special, ascending; () without a tokenizer."""
    if tokenizer is None:
        return ()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {index for index, token in added.items() if getattr(token, "special", False)}
    return tuple(sorted(marked | set(tokenizer.all_special_ids)))
