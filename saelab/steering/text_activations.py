"""Activations of texts for directions and maps: by token, or one vector for each text.

Left out are position 0 (the attention sink), special tokens and padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.models import LanguageModel
from saelab.models.prompts import Batch, several
from saelab.tokens.documents import whole_numbers

BATCH = 16


class Tokens(NamedTuple):
    """The counted tokens of a few texts."""

    texts: Int[Tensor, " n_tokens"]
    """Number of the text of each token, ascending."""
    x: dict[str, Tensor]
    """`(n_tokens, d_in)` at each hook, on the CPU, in the model's dtype."""


def text_list(texts: Any, side: str) -> list[Any]:
    """The texts of one side, each a text or its token ids. Raises `ValueError` if there are none, and for anything else."""
    found = list(several(texts, side))
    if not found:
        raise ValueError(f"{side} holds no text; give a list of texts.")
    if whole_numbers(found) is not None:  # the ids of one text
        return [found]
    if len(found) == 1 and isinstance(found[0], Tensor | np.ndarray) and found[0].ndim == 2:
        found = list(found[0])
    for one in found:
        if not isinstance(one, str) and whole_numbers(one) is None:
            raise ValueError(f"{side} holds {repr(one)[:60]}, which is neither a text nor the token ids of one.")
    return found


def distinct_texts(texts: Any, side: str) -> list[Any]:
    """As `text_list`, each text once."""
    found = text_list(texts, side)
    return list({one if isinstance(one, str) else tuple(whole_numbers(one) or ()): one for one in found}.values())


def counted_tokens(lm: LanguageModel, batch: Batch) -> Bool[Tensor, "batch seq"]:
    """Which tokens count."""
    special = torch.tensor(lm.special_ids, dtype=torch.int64)
    return (batch.positions > 0) & ~torch.isin(batch.ids, special)


def stream_tokens(lm: LanguageModel, texts: Sequence[Any], hook_names: Sequence[str]) -> Iterator[Tokens]:
    """The counted tokens of `texts` at each hook, `BATCH` texts at a time. Active edits apply."""
    for start in range(0, len(texts), BATCH):
        batch = lm.to_batch(texts[start : start + BATCH])
        kept = counted_tokens(lm, batch)
        found = next(iter(lm.stream_activations([batch.ids], list(hook_names))))
        yield Tokens(kept.nonzero()[:, 0] + start, {name: x.cpu()[kept] for name, x in found.items()})


def text_vectors(
    lm: LanguageModel, texts: Sequence[Any], hook_name: str, side: str, tokens: str = "mean"
) -> Float[Tensor, "n_texts d_in"]:
    """One vector in float64 for each text: the mean over its counted tokens, or with `tokens="last"` the last of them.

    Raises `ValueError` for another `tokens`, and for a text without a counted token.
    """
    if tokens not in ("mean", "last"):
        raise ValueError(f"tokens={tokens!r} is unknown; expected 'mean' or 'last'.")
    vectors = torch.zeros(len(texts), lm.d_in(hook_name), dtype=torch.float64)
    counts = torch.zeros(len(texts), dtype=torch.int64)
    for part in stream_tokens(lm, texts, [hook_name]):
        x, here = part.x[hook_name].double(), torch.bincount(part.texts, minlength=len(texts))
        if tokens == "last":
            ends = here.cumsum(0)[here > 0] - 1
            vectors[here > 0] = x[ends]
        else:
            vectors.index_add_(0, part.texts, x)
        counts += here
    if not bool(counts.all()):
        empty = int((counts == 0).nonzero()[0])
        raise ValueError(
            f"{side}[{empty}] has no token to average (the first and special tokens do not count): {str(texts[empty])[:60]!r}; "
            "leave it out, or give texts of at least two tokens."
        )
    return vectors if tokens == "last" else vectors / counts[:, None]
