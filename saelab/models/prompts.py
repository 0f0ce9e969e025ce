"""Prompts (one text or several, token ids in any container) as a batch of token ids and positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelab.tokens.documents import is_table, whole_numbers, zero_or_one
from saelab.tokens.tokenizing import text_ids

Prompt = Any
"""One text or several, token ids (a list, rows, an array, a tensor), or what a tokenizer returns; anything else is refused."""

_EXPECTED = (
    "a text, a non-empty list of texts, token ids (a list, a list of lists, an array or tensor), or what a tokenizer returns "
    '({"input_ids", "attention_mask"})'
)
_ENCODED = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}


class Batch(NamedTuple):
    """Token ids, and the position of each token in its context."""

    ids: Int[Tensor, "batch seq"]
    positions: Int[Tensor, "batch seq"]
    """-1 on padding."""

    def rows(self) -> list[Int[Tensor, " n_tokens"]]:
        """The ids of each prompt, without padding."""
        return [ids[positions >= 0] for ids, positions in zip(self.ids, self.positions, strict=True)]


def several(prompts: Any, name: str) -> Iterable[Any]:
    """Each prompt of a list, an iterator, or a column of texts; one text, tensor or tokenizer's output is a single one.

    Raises `ValueError` for anything else, such as a table, which would yield the names of its columns.
    """
    if isinstance(prompts, np.ndarray) and prompts.dtype.kind in "OTU":
        return prompts.tolist()
    if isinstance(prompts, str | Tensor | np.ndarray) or (
        isinstance(prompts, Mapping) and not set(prompts) - _ENCODED and "input_ids" in prompts
    ):
        return [prompts]
    other = isinstance(prompts, Mapping | bytes | bytearray | Set) or not isinstance(prompts, Iterable)
    if other or is_table(prompts):
        raise ValueError(
            f"{name} is a {type(prompts).__name__}: give a list of prompts, such as one column of a table, "
            "list(table['text'])."
        )
    return prompts


def to_batch(
    prompt: Prompt,
    tokenizer: Any,
    pad_id: int | None,
    positions: Any = None,
    attention_mask: Any = None,
) -> Batch:
    """Token ids, and their positions with -1 on padding: on the right if it is added here, or wherever the caller says.

    `positions` or `attention_mask` (batch, seq) say which of the given ids are padding. Raises `ValueError` for an invalid
    prompt, naming it, and for positions or a mask that do not fit the ids.
    """
    if isinstance(prompt, Mapping):
        prompt, positions, attention_mask = _encoded(prompt, positions, attention_mask)
    ids, counted = _unpadded(prompt, tokenizer, pad_id)
    if positions is None and attention_mask is None:
        return Batch(ids, counted)
    if attention_mask is not None:
        mask = _like(attention_mask, ids, "attention_mask")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("attention_mask must hold only 0 (padding) and 1.")
        counted = torch.where((mask == 1) & (counted >= 0), mask.cumsum(1) - 1, -1)  # padding added here stays padding
    positions = counted if positions is None else _like(positions, ids, "positions")
    if attention_mask is not None:
        positions = torch.where(counted < 0, -1, positions)  # tokenizers go on counting over padding, or put 0 or 1
    _check_positions(positions)
    return Batch(ids, positions)


def _encoded(prompt: Mapping[str, Any], positions: Any, attention_mask: Any) -> tuple[Any, Any, Any]:
    """Ids, positions and mask of a tokenizer's output; the caller's arguments take precedence."""
    unknown = sorted(set(map(str, prompt)) - _ENCODED)
    ids = prompt.get("input_ids", "")
    holds_text = isinstance(ids, str) or (isinstance(ids, list | tuple) and any(isinstance(one, str) for one in ids))
    if holds_text or unknown:
        raise ValueError(f"Got a dict with {', '.join(map(repr, prompt)) or 'nothing'}; expected {_EXPECTED}.")
    if positions is None:
        positions = prompt.get("position_ids")
    return ids, positions, prompt.get("attention_mask") if attention_mask is None else attention_mask


def _unpadded(prompt: Any, tokenizer: Any, pad_id: int | None) -> tuple[Tensor, Tensor]:
    """Ids and positions of a prompt without padding information."""
    if isinstance(prompt, np.ndarray) and prompt.dtype.kind in "iu":
        prompt = torch.from_numpy(prompt.astype(np.int64))
    if isinstance(prompt, Tensor):
        ids = prompt[None] if prompt.ndim == 1 else prompt
        check_shape(ids)
        return ids, torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    rows = _rows(prompt, tokenizer)
    if not rows or not all(rows):
        refused = f"{type(prompt).__name__} {repr(prompt)[:80]}"
        raise ValueError(f"Got {refused}; expected {_EXPECTED}.{_hint(prompt)}")
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id or 0, dtype=torch.int64)
    positions = torch.full_like(ids, -1)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        positions[i, : len(row)] = torch.arange(len(row))
    return ids, positions


def _rows(prompt: Any, tokenizer: Any) -> list[list[int]] | None:
    """The ids of each prompt of a text, or of a list or array of texts or ids; None for anything else."""
    if isinstance(prompt, str):
        return [text_ids(prompt, tokenizer)]
    listed = isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes | bytearray | memoryview)
    items = list(prompt) if listed or hasattr(prompt, "to_list") else []  # a column of a data frame
    if items and all(isinstance(item, str) for item in items):
        return [text_ids(str(item), tokenizer) for item in items]
    if any(isinstance(item, bool) for item in items):
        return None
    if (flat := whole_numbers(items)) is not None:
        return [flat]
    found = [whole_numbers(item) for item in items]
    return None if any(row is None for row in found) else [row for row in found if row is not None]


def _hint(prompt: Any) -> str:
    is_chat = isinstance(prompt, list | tuple) and any(isinstance(item, Mapping) and "role" in item for item in prompt)
    return " Render a conversation with lm.chat(messages)." if is_chat else ""


def _like(given: Any, ids: Tensor, name: str) -> Int[Tensor, "batch seq"]:
    """`given` as int64, in the shape and on the device of `ids`."""
    found = torch.as_tensor(_even(given, ids.shape[1], name))
    found = found[None] if found.ndim == 1 else found
    if found.shape != ids.shape or found.is_floating_point() or found.is_complex():
        kind = f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
        raise ValueError(f"{name} is {kind}; expected one whole number for each of the ids {tuple(ids.shape)}.")
    return found.to(ids.device, torch.int64)


def _even(given: Any, width: int, name: str) -> Any:
    """Rows of unequal length, as a tokenizer returns them without padding, padded with 0. Raises `ValueError` for others."""
    if isinstance(given, Tensor | np.ndarray):
        return given
    rows = (
        [zero_or_one(row) if name == "attention_mask" else whole_numbers(row) for row in given]
        if _nested(given)
        else []
    )
    if rows and all(row is not None and len(row) <= width for row in rows):
        return [[*(row or []), *([0] * (width - len(row or [])))] for row in rows]
    flat = [int(one) if isinstance(one, bool) else one for one in given] if isinstance(given, list | tuple) else given
    if whole_numbers(flat) is None:
        raise ValueError(
            f"{name} is {type(given).__name__} {repr(given)[:60]}; expected one whole number for each token id."
        )
    return flat


def _nested(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(row, list | tuple | np.ndarray | Tensor) for row in given)


def _check_positions(positions: Int[Tensor, "batch seq"]) -> None:
    """Raises `ValueError` unless each row has a token, and its positions increase from token to token."""
    real = positions >= 0
    if not bool((positions >= -1).all()) or not bool(real.any(1).all()):
        raise ValueError("positions must be at least 0, and -1 on padding; every row needs at least one token.")
    before = torch.where(real, positions, -1).cummax(1).values
    if not bool((~real[:, 1:] | (positions[:, 1:] > before[:, :-1])).all()):
        raise ValueError("positions must increase from each token of a row to the next (-1 on padding).")


def check_batch(batch: Batch, model: str, max_ctx: int, d_vocab: int) -> None:
    """Raises `ValueError` for ids or positions that the model cannot read, naming what is wrong."""
    check_shape(batch.ids)
    if batch.ids.shape[1] > max_ctx:
        raise ValueError(f"{batch.ids.shape[1]} tokens exceed the context of {model}, {max_ctx}; give fewer.")
    if (last := int(batch.positions.max())) >= max_ctx:
        raise ValueError(f"Position {last} is outside the context of {model}, {max_ctx}; count from 0.")
    low, high = batch.ids.aminmax()
    if low < 0 or high >= d_vocab:
        wrong = int(high) if high >= d_vocab else int(low)
        raise ValueError(f"Token id {wrong} is outside the vocabulary of {model}, 0 to {d_vocab - 1}.")


def check_shape(ids: Tensor) -> None:
    """Raises `ValueError` unless `ids` are whole numbers in a non-empty (batch, seq)."""
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"Token ids are {ids.dtype} {tuple(ids.shape)}; expected a non-empty int64 (batch, seq).")
