"""Widen half-precision operands: they are a storage format only; ops compute and return at least float32."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor


def widened(*tensors: Tensor | None) -> Any:
    """The tensors in their common promoted dtype, at least float32; a tensor that already has it is returned as is."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors if t is not None), torch.float32)
    return tuple(None if t is None else t.to(dtype) for t in tensors)
