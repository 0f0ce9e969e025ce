"""`bag_sum`: weighted sums of rows of a matrix. Decoding, and every sparse gradient, is one of these.

Over a code's rows it is `S @ W`; over its entries sorted by feature it is `S.T @ g`. Each sum has one fixed order: no
atomics, the same bits on every run.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.dispatch import backend


@torch.no_grad()
def bag_sum(
    values: Float[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " bags_plus_1"],
    W: Float[Tensor, "n_rows width"],
) -> Float[Tensor, "bags width"]:
    """`out[i] = sum over entries j of bag i of values[j] * W[rows[j]]`; an empty bag gives zeros. No gradient."""
    return backend(W).bag_sum(values.detach(), rows, offsets, W.detach())


@torch.no_grad()
def bag_error(
    values: Float[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " bags_plus_1"],
    W: Float[Tensor, "n_rows width"],
    bias: Float[Tensor, " width"] | None,
    target: Float[Tensor, "bags width"],
) -> tuple[Float[Tensor, "bags width"], Float[Tensor, ""]]:
    """`bag_sum + bias - target` and its squared norm, made where the sums are. No gradient."""
    bias = None if bias is None else bias.detach()
    return backend(W).bag_error(values.detach(), rows, offsets, W.detach(), bias, target.detach())
