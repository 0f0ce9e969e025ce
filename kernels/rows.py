"""Row-wise upkeep of a dictionary, in place: projection of its gradient, unit norms."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.dispatch import backend
from saelab.kernels.precision import widened


@torch.no_grad()
def project_(gradient: Float[Tensor, "d_sae d_in"], W: Float[Tensor, "d_sae d_in"]) -> None:
    """Remove the part of each row's gradient along that row; the rows of `W` have unit norm."""
    wide, rows = widened(gradient, W.detach())
    backend(wide).project_(wide, rows)
    if wide is not gradient:
        gradient.copy_(wide)


@torch.no_grad()
def unit_norm_(W: Float[Tensor, "d_sae d_in"]) -> None:
    """Scale each row to norm 1; a row of zeros stays."""
    (wide,) = widened(W)
    backend(wide).unit_norm_(wide)
    if wide is not W:
        W.copy_(wide)
