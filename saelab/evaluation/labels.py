"""Labels of items as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def numbered(labels: Sequence[Any] | Tensor) -> tuple[tuple[Any, ...], Int[Tensor, " n"]]:
    """The different labels in the order of their first items, and the number of each item's label."""
    values = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    number = {label: i for i, label in enumerate(dict.fromkeys(values))}
    return tuple(number), torch.tensor([number[label] for label in values], dtype=torch.int64)
