"""The screen of the Triton backend, with the interface of `kernels/torch_backend/screen.py`; stores only group maxima."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.search import TINY, Candidates, Operands
from saelab.kernels.triton_backend.screen import Screen as GroupScreen

_MEMBERS = 32
_MAXIMA = 1 << 28


def rows_at_once(n_columns: int, dtype: torch.dtype) -> int:
    """How many rows a screen may hold, so that its maxima take at most 1 GiB."""
    return max(1, _MAXIMA // max(1, -(-n_columns // _MEMBERS)))


class Screen:
    """The screen of one chunk of rows: group maxima of `a @ b.T + bias`, and the pairs that reach a floor."""

    def __init__(self, operands: Operands, magnitude: bool = False, min_groups: int = 1) -> None:
        a, b = _with_bias(operands)
        members = _MEMBERS if len(b) >= 4 * _MEMBERS * min_groups else 1
        self._error_bound, self._is_bf16 = operands.error_bound, a.dtype == torch.bfloat16
        self._groups = GroupScreen(a, b, max(1, -(-len(b) // members)), magnitude)

    @property
    def maxima(self) -> Float[Tensor, "rows n_groups"]:
        """Each group's largest entry."""
        return self._groups.maxima

    def best_pairs(self, k: int, margin: Float[Tensor, " rows"]) -> Candidates:
        """Every pair at most `margin` below the row's k-th largest group maximum."""
        return self.pairs_above(self.maxima.topk(k, dim=1, sorted=False).values.amin(1) - margin)

    def pairs_above(self, floor: Float[Tensor, " rows"]) -> Candidates:
        """Every pair whose entry is at least `floor`; in bfloat16 the floor is raised to `TINY`."""
        floor = floor.clamp_min(TINY) if self._is_bf16 else floor
        return Candidates(*self._groups.pairs_above(floor), floor + self._error_bound)


def _with_bias(operands: Operands) -> tuple[Tensor, Tensor]:
    """Operands whose product includes the bias, as one more column of each."""
    a, b, bias = operands.a, operands.b, operands.bias
    if bias is None:
        return a, b
    if bias.ndim == 2:  # one bias per row
        return torch.cat([a, bias], 1), torch.cat([b, b.new_ones(len(b), 1)], 1)
    return torch.cat([a, a.new_ones(len(a), 1)], 1), torch.cat([b, bias[:, None]], 1)
