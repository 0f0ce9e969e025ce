"""Half precision is a way to store weights and rows, not to compute: ops widen it, and answer in float32."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor


def widened(*tensors: Tensor | None) -> Any:
    """The tensors in one dtype, the widest among theirs and at least float32; where they are that already, themselves."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors if t is not None), torch.float32)
    return tuple(None if t is None else t.to(dtype) for t in tensors)
