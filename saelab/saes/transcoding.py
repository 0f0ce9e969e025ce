"""What all transcoders share: they read one hook (x, width d_in) and predict another (y, width d_out):

    y_hat = W_dec z + b_dec [+ W_skip x]

Each hook has its own normalisation; there is no pre-bias. `W_dec` starts at 0, so a transcoder starts as the mean of y. Decoder
rows are not kept at norm 1: a feature's scale is that of its encoder row, which starts at norm 1. The skip (Paulo, Shabalin &
Belrose 2025, "Transcoders beat sparse autoencoders for interpretability") takes the linear part of the map from x to y, so
the features model the nonlinear rest; `W_skip (d_out, d_in)` starts at 0, has no regulariser and does not count towards L0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.saes.base import SAE
from saelab.saes.config import normalization
from saelab.saes.hooks_used import HooksUsed, one_hook
from saelab.saes.inputs import as_activations
from saelab.saes.step import Batch, SAEOutput
from saelab.saes.token_norm import TOKEN_NORMS


class Transcoding(SAE):
    """`W_enc (d_sae, d_in)`, `W_dec (d_sae, d_out)`; `center_out` and `scale_out` are the normalisation of y.

    Mixed into an SAE class that has the encoder and the loss. `decode(feature_acts)` is the features' part; `forward` adds the
    skip, which needs x.
    """

    extension_points = SAE.extension_points | {"has_skip"}
    extra_dims = ("d_out",)
    unit_norm = False

    def __init__(self, config: Any, d_in: int, seed: int = 0, d_out: int | None = None) -> None:
        super().__init__(config, d_in, seed)
        self.unit_norm = False
        self.d_out = d_in if d_out is None else d_out
        self.W_dec = nn.Parameter(torch.zeros(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.center_out: Tensor
        self.scale_out: Tensor
        self.register_buffer("center_out", torch.zeros(self.d_out))
        self.register_buffer("scale_out", torch.ones(()))
        if self.has_skip:
            self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in))

    @property
    def has_skip(self) -> bool:
        """Whether there is a `W_skip`."""
        return getattr(self.config, "skip", False)

    @classmethod
    def hooks(cls, config: Any, names: Sequence[str], hook_name: str | None = None) -> HooksUsed:
        return one_hook(names, hook_name, config.hook_name_out)

    @property
    def pre_bias(self) -> None:
        return None

    def set_normalization(
        self,
        mean: Float[Tensor, " d_in"],
        mean_square: float | Tensor,
        mean_out: Float[Tensor, " d_out"] | None = None,
        mean_square_out: float | Tensor | None = None,
    ) -> None:
        """As for any SAE, and likewise for y, whose statistics default to those of x: "center_and_scale" if x is normalised by
        token."""
        super().set_normalization(mean, mean_square)
        if mean_out is None or mean_square_out is None:
            mean_out, mean_square_out = mean, mean_square
        kind = "center_and_scale" if self.config.normalize in TOKEN_NORMS else self.config.normalize
        center, scale = normalization(kind, mean_out, mean_square_out)
        self.center_out.copy_(center)
        self.scale_out.copy_(scale)

    def start_at(self, x: Float[Tensor, " d_in"], y: Float[Tensor, " d_out"], spread: float) -> None:
        centered = self.config.normalize in TOKEN_NORMS  # of x; y is then centred by its statistics
        super().start_at(x, torch.zeros_like(y) if centered else y, spread)

    def normalized(self, batch: Batch) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """As for any SAE. Raises `ValueError` for a target of the wrong shape."""
        x, y = self.normalize(batch.x), as_activations(batch.y)
        if y.shape != (len(x), self.d_out):
            raise ValueError(f"This transcoder predicts ({len(x)}, {self.d_out}), got y of shape {tuple(y.shape)}.")
        return x, self.normalize_target(y)

    def normalize_target(self, y: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        return (y.to(self.center_out) - self.center_out) * self.scale_out

    def denormalize(self, x_norm: Float[Tensor, "batch d_out"], x: Any = None) -> Float[Tensor, "batch d_out"]:
        """Map back to the units of y; a normalisation by token concerns the input alone."""
        return x_norm / self.scale_out + self.center_out

    def token_sizes(self, x: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch 1"]:
        return torch.ones_like(x[:, :1])

    def sparse_target(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"]
    ) -> Float[Tensor, "batch d_out"]:
        return target - x @ self.W_skip.T.to(x) if self.has_skip else target

    def forward(self, x: Any) -> SAEOutput:
        """`x_hat == decode(feature_acts)`, plus `skip(x)` if there is a skip."""
        feature_acts = self.encode(x)
        y_hat = self.decode(feature_acts)
        return SAEOutput(y_hat + self.skip(x) if self.has_skip else y_hat, feature_acts)

    def skip(self, x: Any) -> Float[Tensor, "batch d_out"]:
        """The output of the skip, in the units of y."""
        x = self.normalize(x)
        return x @ self.W_skip.T.to(x) / self.scale_out

    def decoder(self, source: int = -1) -> tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, ""]]:
        return self.W_dec, self.scale_out
