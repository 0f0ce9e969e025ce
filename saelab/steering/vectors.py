"""Directions from texts: the difference between the mean activations of two sets."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.edits.direction import Direction
from saelab.models import LanguageModel
from saelab.models.prompts import several

_BATCH = 16


def diff_means(lm: LanguageModel, pos: Any, neg: Any, hook_name: str) -> Direction:
    """Difference of means: the mean activation over the tokens of `pos` minus that of `neg`, without position 0 and special
    tokens. Each side is a list of texts, a column of a table, or an iterator.

    Raises `ValueError` when a side has no texts or no tokens left, or for an unknown hook.
    """
    lm.check_hook(hook_name)
    difference = _mean(lm, pos, hook_name, "pos") - _mean(lm, neg, hook_name, "neg")
    if not bool(difference.any()):
        raise ValueError(f"pos and neg have the same mean activation at {hook_name}: give texts that differ.")
    return Direction(difference, hook_name)


def _mean(lm: LanguageModel, texts: Any, hook_name: str, side: str) -> Float[Tensor, " d_in"]:
    texts = list(several(texts, side))
    total, count = torch.zeros(lm.d_in(hook_name), dtype=torch.float64), 0
    special = torch.tensor(lm.special_ids, dtype=torch.int64)
    for start in range(0, len(texts), _BATCH):
        ids, positions = lm.to_batch(texts[start : start + _BATCH])
        kept = (positions > 0) & ~torch.isin(ids, special)
        x = next(iter(lm.stream_activations([ids], [hook_name])))[hook_name].cpu()
        total += x[kept].double().sum(0)
        count += int(kept.sum())
    if count == 0:
        raise ValueError(f"{side} holds {len(texts)} texts and no token to average; give texts of at least two tokens.")
    return (total / count).float()
