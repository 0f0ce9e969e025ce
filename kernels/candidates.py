"""Find candidates: the few (row, feature) pairs that can be in a selection, screened chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from saelab.kernels.dispatch import backend, fast_bf16
from saelab.kernels.error_bounds import bf16_operands, working_operands
from saelab.kernels.search import Candidates, Operands
from saelab.kernels.sparse_acts import offsets_of

MIN_BF16_ROWS = 96
"""With fewer rows, rounding the weights to bfloat16 costs more than it saves."""


def build_operands(x: Tensor, W: Tensor, bias: Tensor, magnitude: bool = False) -> Operands:
    """Operands of the screen: bfloat16 where that is faster, else in the precision of `x`."""
    worth_it = x.dtype == torch.float32 and x.shape[0] >= MIN_BF16_ROWS and fast_bf16(x.device)
    return bf16_operands(x, W, bias, magnitude) if worth_it else working_operands(x, W, bias)


def find_candidates(
    operands: Operands, search: Callable[[Any, slice], Candidates], magnitude: bool = False, min_groups: int = 1
) -> Candidates:
    """Screen all rows, chunk by chunk; `search(screen, rows)` returns the candidates of one chunk from its screen."""
    found = [search(screen, rows) for rows, screen in screens(operands, magnitude, min_groups)]
    offsets = offsets_of(torch.cat([one.offsets.diff() for one in found]))
    return Candidates(torch.cat([one.features for one in found]), offsets, torch.cat([one.bound for one in found]))


def screens(operands: Operands, magnitude: bool, min_groups: int) -> Iterator[tuple[slice, Any]]:
    """A screen for each chunk of rows; without rows, a single empty one."""
    a, b = operands.a, operands.b
    code = backend(a)
    step = code.rows_at_once(b.shape[0], a.dtype)
    for start in range(0, max(a.shape[0], 1), step):
        rows = slice(start, min(start + step, a.shape[0]))
        yield rows, code.Screen(operands.select_rows(rows), magnitude, min_groups)
