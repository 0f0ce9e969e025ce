"""`decode`: sparse codes times the decoder, `x_hat = S @ W_dec + b_dec`, gathering only the rows that fire."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saelab.kernels.sampled_product import sampled_product
from saelab.kernels.sparse_acts import SparseActs
from saelab.kernels.weight_gradients import weight_gradients


class Decode(Function):
    """Gradients: `dvalues = <g, W_dec[f]>` at the firing pairs, `dW_dec = S.T @ g`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, acts: SparseActs) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.acts = acts
        return F.embedding_bag(acts.features, W_dec, acts.offsets[:-1], mode="sum", per_sample_weights=values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, W_dec = ctx.saved_tensors
        acts, g = ctx.acts, grads[0].contiguous()
        to_values = sampled_product(g, W_dec, acts.features, acts.offsets) if ctx.needs_input_grad[0] else None
        to_weights = weight_gradients(acts, values, g) if ctx.needs_input_grad[1] else None
        return to_values, to_weights, None


def decode(
    acts: SparseActs, W_dec: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, " d_in"] | None = None
) -> Float[Tensor, "batch d_in"]:
    """`x_hat = S @ W_dec + b_dec`; differentiable in the codes' values, `W_dec` and `b_dec`."""
    x_hat = Decode.apply(acts.values, W_dec, acts)
    return x_hat if b_dec is None else x_hat + b_dec  # pyright: ignore[reportReturnType]
