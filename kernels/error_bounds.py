"""Rigorous error bounds on the screen's dense product: the reason why the selection is exact.

The dense product of `x` and `W` only finds candidates, and each of its scores is turned into an upper bound. In working
precision the error has the classical bound (Higham 2002, eq. 3.5). In bfloat16 (x~, W~) the rounding errors are measured;
with `r` the largest `|w - w~| / |w|` over the rows of `W`,

    |x~ . w~ - x . w|  <=  |x - x~| |w| + |x~| |w - w~| + gamma |x~| |w|  <=  (|x - x~| + (r + gamma) |x~|) |w|  =  c |w|

One extra column of the operands, c times |w|, adds this bound to each score inside the product; two more carry the bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.kernels.dispatch import backend
from saelab.kernels.search import MARGIN, Operands, gamma, largest_of
from saelab.kernels.workspace import WORKSPACE

_STEP = 2.0**-8  # largest relative error of one rounding to bfloat16
_TILE = 32  # operands are padded to whole tiles: d_in columns, bias (2), bound (1), zeros


def working_operands(x: Tensor, W: Tensor, bias: Tensor) -> Operands:
    """Operands in the precision of `x`; the error bound covers the rounding of the product and of the exact pair."""
    c = 2 * gamma(x.shape[1] + 3, x.dtype) * torch.linalg.vector_norm(x, dim=1).hypot(x.new_ones(()))
    lengths = torch.linalg.vector_norm(W, dim=1).hypot(bias)
    error_bound = c * largest_of(lengths)
    return Operands(x, W, bias, error_bound, 2 * error_bound, (c, lengths))


def bf16_operands(x: Tensor, W: Tensor, bias: Tensor, magnitude: bool) -> Operands:
    """Operands in bfloat16. For magnitudes the bound cannot be a column, as scores may be negative: it is `error_bound`."""
    d_in = x.shape[1]
    width = -(-(d_in + 3) // _TILE) * _TILE
    a = WORKSPACE.take("bf16 rows", (len(x), width), torch.bfloat16, x.device)
    b = WORKSPACE.take("bf16 columns", (len(W), width), torch.bfloat16, x.device)
    (lengths, errors_W), (sizes, errors) = backend(W).round_rows(W, b), backend(x).round_rows(x, a)
    a[:, d_in:] = 0
    b[:, d_in:] = 0
    a[:, d_in : d_in + 2] = 1
    high = bias.to(torch.bfloat16)
    b[:, d_in] = high
    b[:, d_in + 1] = _rounded_up(bias - high + 2 * _STEP**2 * bias.abs() + 1e-30)
    share = largest_of(errors_W / lengths.clamp_min(1e-30)) + 2 * gamma(width, torch.float32)
    c = errors + share * (sizes + errors)
    if magnitude:
        error_bound = c * largest_of(lengths) + 4 * _STEP**2 * largest_of(bias.abs())
        return Operands(a, b, None, error_bound, MARGIN * error_bound, (c, lengths))
    a[:, d_in + 2] = _rounded_up(c)
    b[:, d_in + 2] = _rounded_up(lengths)
    return Operands(a, b, None, torch.zeros_like(c), MARGIN * c * lengths.mean(), (c, lengths))


def _rounded_up(values: Tensor) -> Tensor:
    """bfloat16 numbers that are not below `values`."""
    return (values + _STEP * values.abs()).to(torch.bfloat16)
