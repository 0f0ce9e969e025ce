"""`sampled_product`: `x @ W.T` at chosen (row, feature) pairs only, one pair at a time.

A pair's value depends on its row and its feature alone, bit for bit: alone, in a batch, in cached generation. That is
why every value that leaves an encoder comes from here, and a dense product only finds candidates.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.dispatch import backend


@torch.no_grad()
def sampled_product(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    features: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
) -> Float[Tensor, " nnz"]:
    """`values[j] = <x[row of j], W[features[j]]>`; ids ascend within each row. No gradient."""
    return backend(x).sampled_product(x.detach(), W.detach(), features, offsets)
