"""`jump_relu`: `z = u * H(u - theta)` on sparse pre-activations, with a rectangular-kernel straight-through gradient.

Rajamanoharan et al. 2024 ("Jumping Ahead"), eqs. 11 and 12: `dz/du = H(u - theta)`, and for the threshold
`dz/dtheta = -(theta / eps) K((u - theta) / eps)`, `dH/dtheta = -(1 / eps) K((u - theta) / eps)`, where K is the unit rectangle.
The window depends on the *pre-activation*, so the input must include the band: `encode_threshold(..., band=eps / 2)`.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saelab.kernels.dispatch import backend_name
from saelab.kernels.precision import widened
from saelab.kernels.primitives import bias_gradient
from saelab.kernels.reference.jump_relu import jump_relu as jump_relu_reference
from saelab.kernels.sparse_acts import SparseActs


class JumpReLU(Function):
    """Autograd function of `jump_relu`: value and step of each pair, both differentiable with respect to the threshold."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, theta: Tensor, feature_acts: SparseActs, bandwidth: float, ste_to_input: bool
    ) -> tuple[Tensor, Tensor]:
        at = theta[feature_acts.features]
        on = (u > at).to(u.dtype)
        ctx.save_for_backward(on, at, ((u - at).abs() < bandwidth / 2).to(u.dtype) / bandwidth)
        ctx.feature_acts, ctx.ste_to_input = feature_acts, ste_to_input
        return u * on, on

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        on, at, window = ctx.saved_tensors
        to_theta = -(grads[0] * at + grads[1]) * window
        to_u = grads[0] * on
        to_u = to_u - to_theta if ctx.ste_to_input else to_u
        return to_u, bias_gradient(ctx.feature_acts, to_theta), None, None, None


def jump_relu(
    feature_acts: SparseActs, theta: Float[Tensor, " d_sae"], bandwidth: float, ste_to_input: bool = False
) -> tuple[SparseActs, Float[Tensor, " nnz"]]:
    """Feature activations from the pre-activations `feature_acts`, and `H(u - theta)` of every pair (its sum is the L0).

    Pairs inside the band but not above their threshold are stored with value 0, so that the gradient can reach them. With
    `ste_to_input` the step's straight-through slope also applies to u, since the step depends on `u - theta`.
    """
    u, theta = widened(feature_acts.values, theta)
    if backend_name(u) == "reference":
        return jump_relu_reference(feature_acts.with_values(u), theta, bandwidth, ste_to_input)
    values, steps = JumpReLU.apply(u, theta, feature_acts, bandwidth, ste_to_input)  # pyright: ignore[reportGeneralTypeIssues]
    return feature_acts.with_values(values), steps
