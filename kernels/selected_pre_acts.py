"""`selected_pre_acts`: the pre-activations kept by a selection, made differentiable, with sparse gradients.

Every encoder is a selection (no gradient) followed by this op: the gradient reaches only the rows of `W_enc` that fired.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saelab.kernels.primitives import bias_gradient, spmm, spmm_transposed
from saelab.kernels.sparse_acts import SparseActs


class SelectedPreActs(Function):
    """Autograd function of `values[j] = <x[row] - center, W_enc[f]> + b_enc[f]`, which the selection has computed.

    The gradient of `center` is `-(db_enc @ W_enc)`, summed over the batch first: one vector instead of one row per token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        center: Tensor | None,
        feature_acts: SparseActs,
        centered: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(centered, W_enc)
        ctx.feature_acts = feature_acts
        return feature_acts.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centered, W_enc = ctx.saved_tensors
        feature_acts, g = ctx.feature_acts, grads[0].contiguous()
        x_needs, W_needs, b_needs, center_needs, *_ = ctx.needs_input_grad
        to_x = spmm(g, feature_acts.features, feature_acts.offsets, W_enc) if x_needs else None
        to_weights = spmm_transposed(feature_acts, g, centered) if W_needs else None
        to_bias = bias_gradient(feature_acts, g) if b_needs or center_needs else None
        to_center = None
        if center_needs and to_bias is not None:
            to_center = -(to_bias @ W_enc)
        return to_x, to_weights, to_bias if b_needs else None, to_center, None, None


def selected_pre_acts(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    feature_acts: SparseActs,
    center: Tensor | None = None,
    centered: Tensor | None = None,
) -> SparseActs:
    """`feature_acts` (values computed without a graph) as a differentiable function of `x`, `W_enc`, `b_enc` and `center`.

    `centered` is `x - center`; None means `x` itself: there is no `center`.
    """
    centered = x if centered is None else centered
    values = SelectedPreActs.apply(x, W_enc, b_enc, center, feature_acts, centered.detach())
    return feature_acts.with_values(values)  # pyright: ignore[reportArgumentType]
