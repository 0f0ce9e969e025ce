"""PCA whitening by control data, then one size per token (`normalize="whiten"`, the preparation of Donhauser et al. 2025):

    y = (x - mean) C^(-1/2),   x_norm = y sqrt(d_in) / |y|,   x_hat = mean + x_hat_norm |y| / sqrt(d_in) C^(1/2)

with mean and covariance C of the control data. C^(-1/2) is symmetric: PCA whitening turned back to the axes of x. Eigenvalues
below 1e-5 of their mean count as that much, as directions in which control data hardly vary would otherwise be all noise. The
size sqrt(d_in), the paper's being 1, keeps inputs in the units of all other normalisations.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.kernels.decode import decode
from saelab.kernels.primitives import sddmm
from saelab.kernels.sparse_acts import SparseActs

WHITEN = "whiten"
FLOOR = 1e-5
"""Smallest eigenvalue of a covariance, as a fraction of the mean one."""


class Whitening(nn.Module):
    """`mean`, C^(-1/2) and C^(1/2), which are stored with an SAE."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.whiten: Tensor
        self.unwhiten: Tensor
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("whiten", torch.eye(d_in))
        self.register_buffer("unwhiten", torch.eye(d_in))

    @torch.no_grad()
    def fit(self, mean: Float[Tensor, " d_in"], covariance: Float[Tensor, "d_in d_in"]) -> None:
        """Whiten data of this mean and covariance. Raises `ValueError` if they do not vary."""
        values, axes = torch.linalg.eigh(covariance.double().cpu())
        if not float(values.mean()) > 0:
            raise ValueError("The control data do not vary, so nothing can be whitened by them; give other rows.")
        values = values.clamp_min(FLOOR * values.mean())
        self.mean.copy_(mean)
        self.whiten.copy_((axes * values.rsqrt()) @ axes.T)
        self.unwhiten.copy_((axes * values.sqrt()) @ axes.T)

    def normalize(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Raw activations in whitened units; the mean stays zero."""
        y = self._whitened(x)
        return y / _sizes(y).clamp_min(torch.finfo(y.dtype).tiny)

    def restore(
        self, x_norm: Float[Tensor, "batch d_in"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_in"]:
        """Raw units again, in the sizes of the raw activations `x`."""
        return self.mean + _product(x_norm * self.sizes(x), self.unwhiten)

    def sizes(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch 1"]:
        """What 1 in whitened units is before the sizes of tokens are made equal."""
        return _sizes(self._whitened(x.to(self.mean)))

    def raw_rows(self, rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Directions in whitened units, as directions of raw activations."""
        return rows @ self.unwhiten.to(rows)

    def _whitened(self, x: Tensor) -> Tensor:
        return _product(x - self.mean, self.whiten)


def _product(x: Float[Tensor, "batch d"], matrix: Float[Tensor, "d d"]) -> Float[Tensor, "batch d"]:
    """`x @ matrix` by `decode`, whose result for a row is independent of the rest of the batch, as a matrix product's is not."""
    n, d = x.shape
    ids = torch.arange(d, device=x.device)
    everything = SparseActs(x.flatten(), ids.repeat(n), torch.arange(n + 1, device=x.device) * d, d)
    return decode(everything, matrix)


def _sizes(y: Float[Tensor, "batch d"]) -> Float[Tensor, "batch 1"]:
    ids = torch.arange(len(y) + 1, device=y.device)
    return (sddmm(y, y, ids[:-1], ids).sqrt() / math.sqrt(y.shape[1]))[:, None]
