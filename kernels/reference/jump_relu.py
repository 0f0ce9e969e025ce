"""Reference implementation of `jump_relu`: the step and its straight-through slopes, differentiated by autograd."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def jump_relu(
    u: Float[Tensor, " nnz"], theta: Float[Tensor, " nnz"], bandwidth: float, ste_to_input: bool = False
) -> tuple[Float[Tensor, " nnz"], Float[Tensor, " nnz"]]:
    """`u H(u - theta)` and `H(u - theta)` per pair; inside the window H has slope 1 / bandwidth in `u - theta`."""
    on = (u > theta).to(u.dtype)
    window = ((u - theta).abs() < bandwidth / 2).to(u.dtype) / bandwidth
    distance = (u if ste_to_input else u.detach()) - theta
    slope = window * (distance - distance.detach())  # 0, with a gradient
    return u * on + theta.detach() * slope, on + slope
