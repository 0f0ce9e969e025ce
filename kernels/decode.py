"""`decode`: sparse codes times the decoder, `x_hat = S @ W_dec + b_dec`, gathering only the rows that fire."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saelab.kernels.bag_sum import bag_sum
from saelab.kernels.sampled_product import sampled_product
from saelab.kernels.sparse_acts import SparseActs
from saelab.kernels.weight_gradients import weight_gradients


class Decode(Function):
    """Gradients: `dvalues = <g, W_dec[f]>` at the firing pairs, `dW_dec = S.T @ g`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, acts: SparseActs) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.acts = acts
        return bag_sum(values, acts.features, acts.offsets, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, W_dec = ctx.saved_tensors
        acts, g = ctx.acts, grads[0].contiguous()
        to_values = None
        if ctx.needs_input_grad[0]:  # by feature, in the order that the weight gradients need anyway
            order, rows, offsets = acts.by_feature
            to_values = torch.empty_like(values).index_copy_(0, order, sampled_product(W_dec, g, rows, offsets))
        to_weights = weight_gradients(acts, values, g) if ctx.needs_input_grad[1] else None
        return to_values, to_weights, None


def decode(
    acts: SparseActs, W_dec: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, " d_in"] | None = None
) -> Float[Tensor, "batch d_in"]:
    """`x_hat = S @ W_dec + b_dec`; differentiable in the codes' values, `W_dec` and `b_dec`."""
    x_hat = Decode.apply(acts.values, W_dec, acts)
    return x_hat if b_dec is None else x_hat + b_dec  # pyright: ignore[reportReturnType]
