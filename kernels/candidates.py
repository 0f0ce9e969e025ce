"""Candidates: few pairs among which everything that a selection wants must be, and the proof of it.

A screen (a cheap dense product, in bfloat16 where that is fast) bounds all scores from above. Pairs that reach a floor
are candidates; every other pair lies under `bound = floor + slack`. A selection is complete when its last member is not
under that bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.kernels.dispatch import backend, fast_bf16
from saelab.kernels.rounding import Operands, bf16_operands, working_operands
from saelab.kernels.sparse_acts import offsets_of

TINY = torch.finfo(torch.bfloat16).tiny
"""Scores up to here count as zero."""
MIN_BF16_ROWS = 64
"""Under so many rows, turning the weights into bfloat16 costs more than it saves."""


class Candidates(NamedTuple):
    """CSR pairs, ids ascending in each row."""

    features: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " rows_plus_1"]
    bound: Float[Tensor, " rows"]
    """Every other pair of the row scores less than this, or no more than `TINY`."""

    def completes(self, kth: Float[Tensor, " rows_or_1"]) -> Bool[Tensor, " rows"]:
        """Whether no pair outside the candidates can have a better score than the last one kept."""
        return self.bound <= kth.clamp_min(2 * TINY)


def build_operands(x: Tensor, W: Tensor, bias: Tensor, magnitude: bool = False) -> Operands:
    """bfloat16 operands where they are fast and worth it, working precision elsewhere."""
    worth_it = x.dtype == torch.float32 and x.shape[0] >= MIN_BF16_ROWS and fast_bf16(x.device)
    return bf16_operands(x, W, bias, magnitude) if worth_it else working_operands(x, W, bias)


def find_candidates(
    operands: Operands, search: Callable[[Any, slice], Candidates], magnitude: bool = False, min_groups: int = 1
) -> Candidates:
    """Screen all rows, chunk by chunk; `search(screen, rows)` asks a chunk's screen for its pairs."""
    found = [search(screen, rows) for rows, screen in screens(operands, magnitude, min_groups)]
    offsets = offsets_of(torch.cat([part.offsets.diff() for part in found]))
    return Candidates(torch.cat([part.features for part in found]), offsets, torch.cat([part.bound for part in found]))


def screens(operands: Operands, magnitude: bool, min_groups: int) -> Iterator[tuple[slice, Any]]:
    """A screen for each chunk of rows (one, empty, for no rows)."""
    a, b = operands.a, operands.b
    code = backend(a)
    step = code.rows_at_once(b.shape[0], a.dtype)
    for start in range(0, max(a.shape[0], 1), step):
        rows = slice(start, min(start + step, a.shape[0]))
        yield rows, code.Screen(operands.select_rows(rows), magnitude, min_groups)
