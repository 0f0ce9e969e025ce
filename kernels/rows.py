"""Row-wise upkeep of a dictionary in place: projection of its gradient, unit norms. A few rows at a time, so that each
is read from memory once and no temporary is as large as the dictionary."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_ROWS = 256


@torch.no_grad()
def project_(gradient: Float[Tensor, "d_sae d_in"], W: Float[Tensor, "d_sae d_in"]) -> None:
    """Remove the part of each row's gradient along that row; the rows of `W` have unit norm."""
    for g, w in zip(gradient.split(_ROWS), W.split(_ROWS), strict=True):
        along = (g * w).sum(1, keepdim=True)
        g.addcmul_(along, w, value=-1)


@torch.no_grad()
def unit_norm_(W: Float[Tensor, "d_sae d_in"]) -> None:
    """Scale each row to norm 1; a row of zeros stays."""
    for w in W.split(_ROWS):
        w /= torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).eps)
