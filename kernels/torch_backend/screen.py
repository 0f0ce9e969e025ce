"""The screen in PyTorch: upper bounds on all scores of a chunk of rows, a block of features at a time in one reused
buffer, and the pairs that reach a floor.

In each block the features form groups, feature j in group `j % n_groups`. At least k entries are as large as the k-th
largest group maximum, so it is a lower bound on the k-th largest entry, found among few numbers. The bound holds after
any number of blocks and only rises, so each block is multiplied once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.ragged import flatnonzero, largest, sort
from saelab.kernels.search import TINY, Candidates, Operands
from saelab.kernels.torch_backend.flatnonzero import flatnonzero_at_least
from saelab.kernels.workspace import WORKSPACE

_BUFFER_BYTES = 1 << 25
_ROWS = 2048
_BLOCK = 1024  # columns of a block: a multiple of this
_MEMBERS = 16
_STEP = 2.0**-7
_WORD = 64


def rows_at_once(n_columns: int, dtype: torch.dtype) -> int:
    """How many rows a screen may hold: as many as fit its 32 MiB buffer with all columns, but at least `_ROWS`."""
    return max(_ROWS, _BUFFER_BYTES // (max(n_columns, 1) * dtype.itemsize))


class Screen:
    """The screen of one chunk of rows: entries `a @ b.T + bias` or their magnitudes; valid until the next screen is made."""

    def __init__(self, operands: Operands, magnitude: bool = False, min_groups: int = 1) -> None:
        self._operands, self._magnitude, self._min_groups = operands, magnitude, min_groups
        # Positive bfloat16 numbers have the same order as their bits, and integers are compared many times faster.
        self._is_bits = operands.a.dtype == torch.bfloat16
        self._rows, columns = operands.a.shape[0], operands.b.shape[0]
        fitting = _BUFFER_BYTES // (max(self._rows, 1) * operands.a.dtype.itemsize)
        self._block = max(_BLOCK, fitting // _BLOCK * _BLOCK)
        self._starts = range(0, max(columns, 1), self._block)
        self._width = self._starts[-1] + _padded(columns - self._starts[-1])
        self._only: Tensor | None = None

    @property
    def maxima(self) -> Float[Tensor, "rows n_groups"]:
        """A lower bound on each group's largest entry if that is positive, else an arbitrary non-positive number."""
        return torch.cat([self._lowered(self._maxima(table)).clone() for _, table in self._tables()], 1)

    def best_pairs(self, k: int, margin: Float[Tensor, " rows"]) -> Candidates:
        """Every pair at most `margin` below a lower bound on its row's k-th largest entry (k at most `d_sae`)."""
        best: list[Tensor] = []

        def floor_with(table: Tensor) -> Tensor:
            seen = self._maxima(table) if not best else torch.cat([best.pop(), self._maxima(table)], 1)
            best.append(largest(seen, k) if seen.shape[1] >= k else seen.clone())
            enough = seen.shape[1] >= k
            return (
                self._lowered(best[0][:, 0]) - margin
                if enough
                else torch.full_like(margin, torch.finfo(margin.dtype).min)
            )

        return self._pairs(floor_with)

    def pairs_above(self, floor: Float[Tensor, " rows"]) -> Candidates:
        """Every pair whose entry is at least `floor`; in bfloat16 the floor is raised to `TINY`."""
        return self._pairs(lambda _: floor)

    def _pairs(self, floor_with: Callable[[Tensor], Tensor]) -> Candidates:
        """The pairs that reach the floor of the last block; the floor never falls from block to block."""
        keys: list[Tensor] = []
        entries: list[Tensor] = []
        floor = floors = self._operands.error_bound
        for start, table in self._tables():
            floor = floor_with(table)
            floor = floor.clamp_min(TINY) if self._is_bits else floor
            floors = self._lowest_entry(floor)
            positions = flatnonzero_at_least(table, floors)
            if len(self._starts) > 1:
                entries.append(table.view(-1)[positions])
                positions += positions // table.shape[1] * (self._width - table.shape[1]) + start
            keys.append(positions)
        found = keys[0]
        if len(keys) > 1:
            found = torch.cat(keys)
            found = sort(found[flatnonzero(torch.cat(entries) >= floors[found // self._width])])
        borders = torch.arange(0, (self._rows + 1) * self._width, self._width, device=found.device)
        offsets = torch.searchsorted(found, borders)
        return Candidates(found % self._width, offsets, floor + self._operands.error_bound)

    def _tables(self) -> Iterator[tuple[int, Tensor]]:
        """First feature and entries of each block; a single block is multiplied once and kept."""
        for start in self._starts:
            table = self._multiplied(start) if self._only is None else self._only
            if len(self._starts) == 1:
                self._only = table
            yield start, table

    def _multiplied(self, start: int) -> Tensor:
        (a, b, bias), block = self._operands[:3], slice(start, start + self._block)
        columns = len(b[block])
        buffer = WORKSPACE.take("scores", (self._rows, _padded(columns)), a.dtype, a.device)
        product = buffer[:, :columns]
        if bias is None:
            torch.mm(a, b[block].T, out=product)
        else:
            torch.addmm(bias if bias.ndim == 2 else bias[block], a, b[block].T, out=product)
        if self._magnitude:
            product.abs_()
        buffer[:, columns:] = -torch.inf
        return buffer.view(torch.int16) if self._is_bits else buffer

    def _maxima(self, table: Tensor) -> Tensor:
        """Maxima of groups of `_MEMBERS`, or the entries themselves if there would be too few groups."""
        rows, columns = table.shape
        if columns < 4 * _MEMBERS * self._min_groups:
            return table
        n_groups = columns // _MEMBERS
        out = WORKSPACE.take("maxima", (rows, n_groups), table.dtype, table.device)
        return torch.amax(table.view(rows, _MEMBERS, n_groups), 1, out=out)

    def _lowered(self, values: Tensor) -> Tensor:
        """Lower bounds on the entries, allowing for the rounding of the stored product."""
        return values.view(torch.bfloat16).float() * (1 - _STEP / 2) if self._is_bits else values

    def _lowest_entry(self, floor: Tensor) -> Tensor:
        """The floor in the format of the entries, lowered by what rounding may have taken off an entry."""
        return (floor * (1 - _STEP)).to(torch.bfloat16).view(torch.int16) if self._is_bits else floor


def _padded(columns: int) -> int:
    return -(-columns // _WORD) * _WORD
