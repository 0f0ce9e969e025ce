"""`selected_pre_acts`: pre-activations at the pairs that a selection kept, with their sparse gradients.

Every encoder is a selection (no gradient) followed by this: the gradient reaches only the rows of `W_enc` that fired.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saelab.kernels.sparse_acts import SparseActs
from saelab.kernels.weight_gradients import bias_gradient, weight_gradients


class SelectedPreActs(Function):
    """`values[j] = <x[row], W_enc[f]> + b_enc[f]`, computed by the selection; here they get their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, acts: SparseActs) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.acts = acts
        return acts.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, W_enc = ctx.saved_tensors
        acts, g = ctx.acts, grads[0].contiguous()
        to_x = to_weights = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = F.embedding_bag(acts.features, W_enc, acts.offsets[:-1], mode="sum", per_sample_weights=g)
        if ctx.needs_input_grad[1]:
            to_weights = weight_gradients(acts, g, x)
        if ctx.needs_input_grad[2]:
            to_bias = bias_gradient(acts, g)
        return to_x, to_weights, to_bias, None


def selected_pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor, acts: SparseActs) -> SparseActs:
    """`acts` (values computed without a graph) as a differentiable function of `x`, `W_enc` and `b_enc`."""
    values = SelectedPreActs.apply(x, W_enc, b_enc, acts)
    return acts.with_values(values)  # pyright: ignore[reportArgumentType]
