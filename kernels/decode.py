"""`decode`: `x_hat = S @ W_dec + b_dec` from sparse feature activations `S`, gathering only the rows that fire; and
`decode_error`, the squared error of `x_hat`, with bias, target and squares fused into the same pass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saelab.kernels.dispatch import backend_name
from saelab.kernels.precision import widened
from saelab.kernels.primitives import sddmm, spmm, spmm_residual, spmm_transposed
from saelab.kernels.reference.decode import decode as decode_reference
from saelab.kernels.sparse_acts import SparseActs


class Decode(Function):
    """Autograd function of `decode`. Gradients: `dvalues = <g, W_dec[f]>` at the active pairs, `dW_dec = S.T @ g`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, feature_acts: SparseActs) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.feature_acts = feature_acts
        return spmm(values, feature_acts.features, feature_acts.offsets, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return *_gradients(ctx, grads[0].contiguous()), None


class DecodeError(Function):
    """`sum |x_hat - target|^2` and `x_hat - target`; only the first is differentiable, with `g = 2 (x_hat - target)`."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor | None, target: Tensor, feature_acts: SparseActs
    ) -> tuple[Tensor, Tensor]:
        residual, error = spmm_residual(values, feature_acts.features, feature_acts.offsets, W_dec, b_dec, target)
        ctx.save_for_backward(values, W_dec, residual)
        ctx.feature_acts = feature_acts
        ctx.mark_non_differentiable(residual)
        return error, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = ctx.saved_tensors[2] * (2 * grads[0])
        to_values, to_W_dec = _gradients(ctx, g)
        to_b_dec = g.sum(0) if ctx.needs_input_grad[2] else None
        return to_values, to_W_dec, to_b_dec, -g if ctx.needs_input_grad[3] else None, None


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients with respect to the values and `W_dec`, from the gradient `g (batch, d_in)` of `x_hat`."""
    values, W_dec = ctx.saved_tensors[:2]
    feature_acts, to_values = ctx.feature_acts, None
    if ctx.needs_input_grad[0]:  # in order of features, which the weight gradient needs anyway
        order, rows, offsets = feature_acts.by_feature
        to_values = torch.empty_like(values).index_copy_(0, order, sddmm(W_dec, g, rows, offsets))
    return to_values, spmm_transposed(feature_acts, values, g) if ctx.needs_input_grad[1] else None


def decode(
    feature_acts: SparseActs,
    W_dec: Float[Tensor, "d_sae *sources d_in"],
    b_dec: Float[Tensor, "*sources d_in"] | None = None,
) -> Float[Tensor, "batch *sources d_in"]:
    """`x_hat = S @ W_dec + b_dec`; differentiable with respect to the values of `feature_acts`, `W_dec` and `b_dec`.

    A crosscoder's `W_dec` has a source axis after the feature axis; all sources are decoded in one pass. Raises
    `ValueError` unless `feature_acts` is a `SparseActs` of `d_sae` features.
    """
    check_feature_acts(feature_acts, W_dec.shape[0])
    values, W_dec, b_dec = widened(feature_acts.values, W_dec, b_dec)
    if backend_name(W_dec) == "reference":
        return decode_reference(feature_acts.with_values(values), W_dec, b_dec)
    x_hat = Decode.apply(values, W_dec.flatten(1), feature_acts)
    x_hat = x_hat.unflatten(1, W_dec.shape[1:])
    return x_hat if b_dec is None else x_hat + b_dec


def decode_error(
    feature_acts: SparseActs,
    W_dec: Float[Tensor, "d_sae *sources d_in"],
    b_dec: Float[Tensor, "*sources d_in"] | None,
    target: Float[Tensor, "batch *sources d_in"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch *sources d_in"]]:
    """`sum |x_hat - target|^2` over the batch, and `x_hat - target`, detached; `x_hat` as in `decode`.

    Differentiable with respect to the values of `feature_acts`, `W_dec`, `b_dec` and `target`.
    """
    if backend_name(W_dec) == "reference":
        residual = decode(feature_acts, W_dec, b_dec) - target
        return residual.square().sum(), residual.detach()
    check_feature_acts(feature_acts, W_dec.shape[0])
    values, W_dec, b_dec, target = widened(feature_acts.values, W_dec, b_dec, target)
    bias = None if b_dec is None else b_dec.flatten()
    error, residual = DecodeError.apply(values, W_dec.flatten(1), bias, target.flatten(1), feature_acts)  # pyright: ignore
    return error, residual.unflatten(1, target.shape[1:])


def check_feature_acts(feature_acts: object, d_sae: int) -> None:
    """Raise `ValueError` unless `feature_acts` is a `SparseActs` of `d_sae` features."""
    if not isinstance(feature_acts, SparseActs):
        raise ValueError(
            f"decode takes the SparseActs that encode returns, got {type(feature_acts).__name__}. Convert a dense tensor "
            "(batch, d_sae) with saelab.kernels.sparse_acts.SparseActs.from_dense(tensor)."
        )
    if feature_acts.d_sae != d_sae:
        raise ValueError(
            f"feature_acts has d_sae={feature_acts.d_sae}, but the decoder has d_sae={d_sae}. Decode with the SAE that encoded."
        )
