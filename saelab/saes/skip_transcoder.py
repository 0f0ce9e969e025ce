"""Skip transcoder (Paulo, Shabalin & Belrose 2025, "Transcoders beat sparse autoencoders for interpretability"):

    y_hat = W_dec z + b_dec + W_skip x

The linear part of the map from x to y bypasses the features, which model the nonlinear rest. `W_skip (d_out, d_in)` starts
at 0 (a plain transcoder), has no regulariser and does not count towards L0. `decode(feature_acts)` is the features' part;
`forward` adds the skip, which needs x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.saes.step import SAEOutput
from saelab.saes.transcoder import TranscoderConfig, TranscoderSAE


@dataclass(frozen=True)
class SkipTranscoderConfig(TranscoderConfig):
    """A transcoder's config; the skip connection has no settings of its own."""


class SkipTranscoderSAE(TranscoderSAE):
    """A transcoder with a linear skip connection."""

    variant = "skip_transcoder"
    Config = SkipTranscoderConfig

    def __init__(self, config: SkipTranscoderConfig, d_in: int, seed: int = 0, d_out: int | None = None) -> None:
        super().__init__(config, d_in, seed, d_out)
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in))

    def sparse_target(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"]
    ) -> Float[Tensor, "batch d_out"]:
        return target - x @ self.W_skip.T.to(x)

    def forward(self, x: Any) -> SAEOutput:
        """`x_hat == decode(feature_acts) + skip(x)`."""
        feature_acts = self.encode(x)
        return SAEOutput(self.decode(feature_acts) + self.skip(x), feature_acts)

    def skip(self, x: Any) -> Float[Tensor, "batch d_out"]:
        """The output of the skip connection, in the units of y."""
        x = self.normalize(x)
        return x @ self.W_skip.T.to(x) / self.scale_out
