"""Reference implementation of `jump_relu`: the step and its straight-through slopes, differentiated by autograd."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs


def jump_relu(
    feature_acts: SparseActs, theta: Float[Tensor, " d_sae"], bandwidth: float, ste_to_input: bool = False
) -> tuple[SparseActs, Float[Tensor, " nnz"]]:
    """`u H(u - theta)` and `H(u - theta)` of the pairs u = `feature_acts`; inside the window
    H has slope 1 / bandwidth in `u - theta`."""
    u, theta = feature_acts.values, theta[feature_acts.features]
    on = (u > theta).to(u.dtype)
    window = ((u - theta).abs() < bandwidth / 2).to(u.dtype) / bandwidth
    distance = (u if ste_to_input else u.detach()) - theta
    slope = window * (distance - distance.detach())  # 0, with a gradient
    return feature_acts.with_values(u * on + theta.detach() * slope), on + slope
