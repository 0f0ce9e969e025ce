"""The primitives that every op is built from, without gradients: `sddmm`, `spmm`, `spmm_transposed`, and two row-wise passes.

`sddmm` is `x @ W.T` at chosen pairs. A value depends on its row and its feature alone, so it is bit-identical whether the row
is encoded alone, in a batch or in cached generation. Every value that an encoder returns comes from here; dense products
only find candidates.

`spmm` is `S @ W` (decoding). `spmm_transposed` is `S.T @ g`, the gradient of both weight matrices; it uses the sort by feature
that is made once per step (`SparseActs.by_feature`). Both sum in a fixed order without atomics: the same bits on every run.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.dispatch import backend
from saelab.kernels.precision import widened
from saelab.kernels.sparse_acts import SparseActs


@torch.no_grad()
def sddmm(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    features: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
) -> Float[Tensor, " nnz"]:
    """`values[j] = <x[row of j], W[features[j]]>`; ids ascend within each row. No gradient."""
    return backend(x).sddmm(x.detach(), W.detach(), features, offsets)


@torch.no_grad()
def spmm(
    values: Float[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " bags_plus_1"],
    W: Float[Tensor, "n_rows width"],
) -> Float[Tensor, "bags width"]:
    """`out[i] = sum over entries j of bag i of values[j] * W[rows[j]]`; zeros for an empty bag. No gradient."""
    return backend(W).spmm(values.detach(), rows, offsets, W.detach())


@torch.no_grad()
def spmm_residual(
    values: Float[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " bags_plus_1"],
    W: Float[Tensor, "n_rows width"],
    bias: Float[Tensor, " width"] | None,
    target: Float[Tensor, "bags width"],
) -> tuple[Float[Tensor, "bags width"], Float[Tensor, ""]]:
    """`spmm + bias - target` and its squared norm, in one pass. No gradient."""
    bias = None if bias is None else bias.detach()
    return backend(W).spmm_residual(values.detach(), rows, offsets, W.detach(), bias, target.detach())


@torch.no_grad()
def spmm_transposed(
    feature_acts: SparseActs, values: Float[Tensor, " nnz"], g: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_sae d_in"]:
    """`out[f] = sum over entries j of feature f of values[j] * g[row of j]`, on the pattern of `feature_acts`."""
    return backend(g).spmm_transposed(feature_acts, values.detach(), g.detach())


@torch.no_grad()
def bias_gradient(feature_acts: SparseActs, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
    """`out[f] = sum of the values at feature f`, in the order of the rows."""
    return backend(values).bias_gradient(feature_acts, values.detach())


@torch.no_grad()
def project_(gradient: Float[Tensor, "d_sae d_in"], W: Float[Tensor, "d_sae d_in"]) -> None:
    """In place: remove from each row of the gradient its component along the row of `W`, which has unit norm."""
    wide, rows = widened(gradient, W.detach())
    backend(wide).project_(wide, rows)
    if wide is not gradient:
        gradient.copy_(wide)


@torch.no_grad()
def unit_norm_(W: Float[Tensor, "d_sae d_in"]) -> None:
    """In place: scale each row to norm 1; a row of zeros stays zero."""
    (wide,) = widened(W)
    backend(wide).unit_norm_(wide)
    if wide is not W:
        W.copy_(wide)
