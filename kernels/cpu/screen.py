"""The screen in PyTorch: upper bounds of all scores of some rows in one reused buffer, and the pairs that reach a floor.

Features fall into groups, feature j into group `j % n_groups`. The k groups with the largest maxima hold at least k
entries as large as the k-th of these maxima, so that one is a lower bound of the k-th largest entry, found among
`n_groups` numbers instead of `d_sae`.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.cpu.places import places_not_below
from saelab.kernels.ragged import kth_largest
from saelab.kernels.rounding import Operands
from saelab.kernels.workspace import WORKSPACE

_BUFFER_BYTES = 1 << 25
_MEMBERS = 16
_STEP = 2.0**-7
_WORD = 64


def rows_at_once(n_columns: int, dtype: torch.dtype) -> int:
    """How many rows a screen may take, so that its buffer stays under 32 MiB."""
    return max(1, _BUFFER_BYTES // (max(n_columns, 1) * dtype.itemsize))


class Screen:
    """Entries `a @ b.T + bias` (or their magnitudes) of one chunk of rows; valid until the next screen is made."""

    def __init__(self, operands: Operands, magnitude: bool = False, min_groups: int = 1) -> None:
        a, b, bias = operands.a, operands.b, operands.bias
        rows, columns = a.shape[0], b.shape[0]
        self._members = _MEMBERS if columns >= 4 * _MEMBERS * min_groups else 1
        padded = -(-columns // _WORD) * _WORD
        buffer = WORKSPACE.take("scores", (rows, padded), a.dtype, a.device)
        product = buffer[:, :columns]
        torch.mm(a, b.T, out=product) if bias is None else torch.addmm(bias, a, b.T, out=product)
        if magnitude:
            product.abs_()
        buffer[:, columns:] = -torch.inf
        # Positive bfloat16 numbers are ordered as their bits are, and integers are compared many times faster.
        self._is_bits = a.dtype == torch.bfloat16
        self._entries = buffer.view(torch.int16) if self._is_bits else buffer

    @cached_property
    def _maxima(self) -> Tensor:
        rows, columns = self._entries.shape
        if self._members == 1:
            return self._entries
        n_groups = columns // self._members
        out = WORKSPACE.take("maxima", (rows, n_groups), self._entries.dtype, self._entries.device)
        return torch.amax(self._entries.view(rows, self._members, n_groups), 1, out=out)

    @property
    def maxima(self) -> Float[Tensor, "rows n_groups"]:
        """A lower bound of each group's largest entry, as far as it is positive (others are any number that is not)."""
        return self._lowered(self._maxima)

    def kth_maxima(self, k: int) -> Float[Tensor, " rows"]:
        """Each row's k-th largest group maximum (k at most `n_groups`): a lower bound of its k-th largest entry."""
        return self._lowered(kth_largest(self._maxima, k))

    def _lowered(self, values: Tensor) -> Tensor:
        return values.view(torch.bfloat16).float() * (1 - _STEP / 2) if self._is_bits else values

    def pairs_above(self, floor: Float[Tensor, " rows"]) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " rows_plus_1"]]:
        """Features (ascending in each row) and offsets of every pair whose entry is `floor` or more.

        In bfloat16 floors are positive, and lowered by what the rounding of the product may have taken off an entry.
        """
        if self._is_bits:
            floor = (floor * (1 - _STEP)).to(torch.bfloat16).view(torch.int16)
        rows, columns = self._entries.shape
        keys = places_not_below(self._entries, floor)
        offsets = torch.searchsorted(keys, torch.arange(0, (rows + 1) * columns, columns, device=keys.device))
        return keys % columns, offsets
