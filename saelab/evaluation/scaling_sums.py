"""Sums over tokens from which Latent Scaling follows (Minder et al. 2025, arXiv 2504.02922, section 3.1), in float64.

For a feature with activation z and a direction r, and the target y of source m, the least-squares factor on `z r` is

    beta = <r, sum_t z y> / (|r|^2 sum_t z^2),   y = e_m + z d_m ("error")   or   y = x_hat_m ("reconstruction")

where `e_m = x_m - x_hat_m` and d_m is the feature's decoder row there. The numerators are kept by blocks of tokens, so that
blocks can be resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from saelab.evaluation.reconstruction import VarianceSums
from saelab.kernels.decode import decode
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import CrosscoderSAE

_ENTRIES = 65_536


class ScalingSums:
    """The sums for these sources and for one or several directions of each feature, in the units of the weights."""

    def __init__(
        self,
        sae: CrosscoderSAE,
        sources: Sequence[int],
        directions: Float[Tensor, "n_directions d_sae d_in"],
        n_blocks: int = 1,
    ) -> None:
        self.sae, self.sources, self.directions = sae, list(sources), directions.double()
        shape = (len(directions), len(self.sources), n_blocks, sae.d_sae)
        self._along_error, self._along_hat = torch.zeros(2, *shape, dtype=torch.float64, device=directions.device)
        self.squares, self.n_fired = torch.zeros(2, n_blocks, sae.d_sae, dtype=torch.float64, device=directions.device)
        """`sum_t z^2` and the number of tokens with z not 0, by block and feature."""
        self.variances = [VarianceSums() for _ in self.sources]
        """How well each source is reconstructed."""

    @torch.no_grad()
    def add(self, raw: Float[Any, "n n_sources d_in"], block: Int[Tensor, " n"] | None = None) -> SparseActs:
        """Add tokens, each to its block (None: the first); returns their feature activations."""
        x = self.sae.checked(self.sae.normalize(raw))
        feature_acts = self.sae.encode_normalized(x)
        x, x_hat = (
            rearrange(rows, "token (source d) -> token source d", source=self.sae.n_sources).double()
            for rows in (x, decode(feature_acts, *self.sae.rows[1:]))
        )
        for source, sums in zip(self.sources, self.variances, strict=True):
            sums.add(x[:, source], x_hat[:, source])
        error = x - x_hat
        for entries in torch.arange(feature_acts.nnz, device=x.device).split(_ENTRIES):
            z, rows = feature_acts.values[entries].double(), feature_acts.rows[entries]
            features = feature_acts.features[entries]
            cells = features if block is None else block.to(x.device)[rows] * self.sae.d_sae + features
            self.squares.view(-1).index_add_(0, cells, z.square())
            self.n_fired.view(-1).index_add_(0, cells, (z != 0).double())
            for total, y in ((self._along_error, error), (self._along_hat, x_hat)):
                for direction, of_direction in zip(self.directions, total, strict=True):
                    for source, of_source in zip(self.sources, of_direction, strict=True):
                        along = (direction[features] * y[rows, source]).sum(1)
                        of_source.view(-1).index_add_(0, cells, z * along)
        return feature_acts

    @property
    def numerators(self) -> Float[Tensor, "2 n_directions n_sources n_blocks d_sae"]:
        """`<r, sum_t z y>` for the targets "error" and "reconstruction"."""
        decoder = self.sae.W_dec.detach().double()[self.sources]
        put_back = torch.einsum("rfd,sfd->rsf", self.directions, decoder)[:, :, None] * self.squares
        return torch.stack([self._along_error + put_back, self._along_hat])

    @property
    def betas(self) -> Float[Tensor, "2 n_directions n_sources d_sae"]:
        """The factors over all blocks; NaN for a feature that never fired, or a direction of zeros."""
        weight = self.squares.sum(0) * self.directions.square().sum(2)[:, None]
        return self.numerators.sum(3) / torch.where(weight > 0, weight, torch.nan)
