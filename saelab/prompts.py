"""What a caller gives a model to read (a text, texts, token ids) turned into token ids and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

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


def special_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Every id the tokenizer marks as special, ascending; () without a tokenizer."""
    if tokenizer is None:
        return ()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {index for index, token in added.items() if getattr(token, "special", False)}
    return tuple(sorted(marked | set(tokenizer.all_special_ids)))
