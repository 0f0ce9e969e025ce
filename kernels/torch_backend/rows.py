"""Row-wise upkeep of a dictionary in PyTorch, a few rows at a time: each is read from memory once and no temporary is as
large as the dictionary."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from saelab.kernels.torch_backend.sddmm import pairs
from saelab.kernels.workspace import WORKSPACE

_ROWS = 512


def round_rows(W: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Write `W`, rounded, in the first columns of `low`; the norm of each row, and of what it lost."""
    norms, errors = torch.empty(2, len(W), dtype=W.dtype, device=W.device)
    room = WORKSPACE.take("rounding", (min(_ROWS, len(W)), W.shape[1]), W.dtype, W.device)
    for start in range(0, len(W), _ROWS):
        rows = slice(start, start + _ROWS)
        difference = room[: len(W[rows])].copy_(low[rows, : W.shape[1]].copy_(W[rows])).sub_(W[rows])
        norms[rows], errors[rows] = row_dots(W[rows], W[rows]), row_dots(difference, difference)
    return norms.sqrt_(), errors.sqrt_()


def project_(gradient: Tensor, W: Tensor) -> None:
    """Remove the part of each row's gradient along that row."""
    for g, w in zip(gradient.split(_ROWS), W.split(_ROWS), strict=True):
        g.addcmul_(row_dots(g, w)[:, None], w, value=-1)


def unit_norm_(W: Tensor) -> None:
    """Scale each row to norm 1; a row of zeros stays."""
    for w in W.split(_ROWS):
        w *= row_dots(w, w).sqrt_().clamp_min_(torch.finfo(W.dtype).eps).reciprocal_()[:, None]


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """`<a[i], b[i]>` of up to `_ROWS` rows; the gather-dot takes half the time of multiplying and summing."""
    ids = _ids(a.device)[: len(a)]
    return pairs(a, b, ids, ids)


@cache
def _ids(device: torch.device) -> Tensor:
    return torch.arange(_ROWS, dtype=torch.int32, device=device)
