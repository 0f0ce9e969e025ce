"""How wrong a cheap product can be, rigorously: what makes the selection exact.

A dense product of `x` and `W` only finds candidates, and every score it gives is turned into an upper bound. In working
precision the error has the classical bound (Higham 2002, eq. 3.5). In bfloat16 (x~, W~) the rounding errors are measured,
and `r` is the largest `|w - w~| / |w|`:

    |x~ . w~ - x . w|  <=  |x - x~| |w| + |x~| |w - w~| + gamma |x~| |w|  <=  (|x - x~| + (r + gamma) |x~|) |w|  =  c |w|

Two factors of one more column, c and |w|, add it to each score inside the product; two more carry the bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.dispatch import backend
from saelab.kernels.workspace import WORKSPACE

_STEP = 2.0**-8  # largest relative error of one rounding to bfloat16
_TILE = 32  # the operands are as wide as whole tiles: d_in, bias (2), bound (1), zeros
WINDOW = 1.2
"""Width of the bfloat16 window in error bounds; wider means more candidates and fewer rows done anew."""


class Operands(NamedTuple):
    """What a screen multiplies. `a @ b.T (+ bias)`, plus `slack`, is at least the score, for every pair."""

    a: Tensor
    """(rows, K)"""
    b: Tensor
    """(columns, K)"""
    bias: Tensor | None
    """(columns) or (rows, 1) added to the product; None where columns of `a` and `b` carry it."""
    slack: Float[Tensor, " rows"]
    """By how much a score may exceed its entry of the product."""
    window: Float[Tensor, " rows"]
    """How far under the k-th group maximum a floor is set: wide enough that nearly every row is certified."""
    sizes: tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]
    """Two factors whose product bounds the error of a pair."""

    def select_rows(self, rows: slice | Int[Tensor, " n"]) -> Operands:
        """The same for some rows."""
        bias = self.bias[rows] if self.bias is not None and self.bias.ndim == 2 else self.bias
        c, lengths = self.sizes
        return Operands(self.a[rows], self.b, bias, self.slack[rows], self.window[rows], (c[rows], lengths))

    def transposed(self) -> Operands:
        """The same with rows and columns exchanged (values, not magnitudes)."""
        c, lengths = self.sizes
        if self.bias is not None:
            slack = lengths * _largest(c)
            return Operands(self.b, self.a, self.bias[:, None], slack, 2 * slack, (lengths, c))
        return Operands(self.b, self.a, None, torch.zeros_like(lengths), WINDOW * lengths * c.mean(), (lengths, c))


def gamma(terms: int, dtype: torch.dtype) -> float:
    """`n u / (1 - n u)`: relative error of a sum of `terms` products."""
    unit = torch.finfo(dtype).eps / 2
    return terms * unit / (1 - terms * unit)


def working_operands(x: Tensor, W: Tensor, bias: Tensor) -> Operands:
    """The product in the precision of `x`; its rounding and that of the exact pair are both in the slack."""
    c = 2 * gamma(x.shape[1] + 3, x.dtype) * torch.linalg.vector_norm(x, dim=1).hypot(x.new_ones(()))
    lengths = torch.linalg.vector_norm(W, dim=1).hypot(bias)
    slack = c * _largest(lengths)
    return Operands(x, W, bias, slack, 2 * slack, (c, lengths))


def bf16_operands(x: Tensor, W: Tensor, bias: Tensor, magnitude: bool) -> Operands:
    """The product in bfloat16. For magnitudes the bound cannot be added inside (a sign is in the way): it is the slack."""
    d_in = x.shape[1]
    width = -(-(d_in + 3) // _TILE) * _TILE
    a = WORKSPACE.take("bf16 rows", (len(x), width), torch.bfloat16, x.device)
    b = WORKSPACE.take("bf16 columns", (len(W), width), torch.bfloat16, x.device)
    (lengths, lost_W), (sizes, lost) = backend(W).round_rows(W, b), backend(x).round_rows(x, a)
    a[:, d_in:] = 0
    b[:, d_in:] = 0
    a[:, d_in : d_in + 2] = 1
    high = bias.to(torch.bfloat16)
    b[:, d_in] = high
    b[:, d_in + 1] = _rounded_up(bias - high + 2 * _STEP**2 * bias.abs() + 1e-30)
    share = _largest(lost_W / lengths.clamp_min(1e-30)) + 2 * gamma(width, torch.float32)
    c = lost + share * (sizes + lost)
    if magnitude:
        slack = c * _largest(lengths) + 4 * _STEP**2 * _largest(bias.abs())
        return Operands(a, b, None, slack, WINDOW * slack, (c, lengths))
    a[:, d_in + 2] = _rounded_up(c)
    b[:, d_in + 2] = _rounded_up(lengths)
    return Operands(a, b, None, torch.zeros_like(c), WINDOW * c * lengths.mean(), (c, lengths))


def _rounded_up(values: Tensor) -> Tensor:
    """The nearest bfloat16 numbers that are not below `values`."""
    return (values + _STEP * values.abs()).to(torch.bfloat16)


def _largest(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())
