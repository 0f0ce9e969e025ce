"""Row-wise upkeep of a dictionary in PyTorch, a few rows at a time: each is read from memory once and no temporary is as
large as the dictionary."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 512


def round_rows(W: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Write `W`, rounded, in the first columns of `low`; the norm of each row, and of what it lost."""
    norms, lost = torch.empty(2, len(W), dtype=W.dtype, device=W.device)
    for start in range(0, len(W), _ROWS):
        rows = slice(start, start + _ROWS)
        difference = low[rows, : W.shape[1]].copy_(W[rows]).to(W.dtype).sub_(W[rows])
        torch.linalg.vector_norm(difference, dim=1, out=lost[rows])
        torch.linalg.vector_norm(W[rows], dim=1, out=norms[rows])
    return norms, lost


def project_(gradient: Tensor, W: Tensor) -> None:
    """Remove the part of each row's gradient along that row."""
    for g, w in zip(gradient.split(_ROWS), W.split(_ROWS), strict=True):
        along = (g * w).sum(1, keepdim=True)
        g.addcmul_(along, w, value=-1)


def unit_norm_(W: Tensor) -> None:
    """Scale each row to norm 1; a row of zeros stays."""
    for w in W.split(_ROWS):
        w *= torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).eps).reciprocal_()
