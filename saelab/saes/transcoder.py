"""Transcoder (Dunefsky et al. 2024; TopK and zero start as in EleutherAI's sparsify): features of one hook that predict
another, for example an MLP's output from its input:

    z = ReLU(TopK(W_enc x + b_enc)),   y_hat = W_dec z + b_dec,   L = FVU against y + auxk_alpha * AuxK

No pre-bias: `b_dec` belongs to the output hook. x and y are normalised separately, each by its own statistics. `W_dec` starts
at 0, so that the initial prediction is the bias alone; its rows therefore cannot be kept at norm 1, and the scale of a feature
is that of its encoder row, which starts at norm 1. AuxK works as elsewhere: a dead feature's decoder row can grow from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.config import normalization
from saelab.saes.hooks_used import HooksUsed, one_hook
from saelab.saes.inputs import as_activations
from saelab.saes.selection import SelectionConfig, SelectionSAE
from saelab.saes.step import Batch

FOLDED_SELECTION = "the k largest u / folded of the token, where positive"


@dataclass(frozen=True)
class TranscoderConfig(SelectionConfig):
    """A dictionary of `d_sae` features, of which at most `k` fire per token, from one hook to another."""

    hook_name_out: str | None = None
    """Hook to predict; None means the one that is read (a plain SAE without pre-bias)."""


class TranscoderSAE(SelectionSAE):
    """`W_enc (d_sae, d_in)`, `W_dec (d_sae, d_out)`; `center_out` and `scale_out` are the normalisation of y."""

    variant = "transcoder"
    Config = TranscoderConfig
    config: TranscoderConfig
    extra_dims = ("d_out",)
    unit_norm = False
    selection_rule = "the k largest u of the token, where positive"

    def __init__(self, config: TranscoderConfig, d_in: int, seed: int = 0, d_out: int | None = None) -> None:
        super().__init__(config, d_in, seed)
        self.d_out = d_in if d_out is None else d_out
        self.W_dec = nn.Parameter(torch.zeros(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.center_out: Tensor
        self.scale_out: Tensor
        self.register_buffer("center_out", torch.zeros(self.d_out))
        self.register_buffer("scale_out", torch.ones(()))
        self.folded: Tensor | None
        self.register_buffer("folded", None)

    @classmethod
    def hooks(cls, config: TranscoderConfig, names: Sequence[str], hook_name: str | None = None) -> HooksUsed:
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
        """As for any SAE, and likewise for y, whose statistics default to those of x."""
        super().set_normalization(mean, mean_square)
        if mean_out is None or mean_square_out is None:
            mean_out, mean_square_out = mean, mean_square
        center, scale = normalization(self.config.normalize, mean_out, mean_square_out)
        self.center_out.copy_(center)
        self.scale_out.copy_(scale)

    def normalized(self, batch: Batch) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """As for any SAE. Raises `ValueError` for a target of the wrong shape."""
        x, y = self.normalize(batch.x), as_activations(batch.y)
        if y.shape != (len(x), self.d_out):
            raise ValueError(f"This transcoder predicts ({len(x)}, {self.d_out}), got y of shape {tuple(y.shape)}.")
        return x, self.normalize_target(y)

    def normalize_target(self, y: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        return (y.to(self.center_out) - self.center_out) * self.scale_out

    def denormalize(self, x: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        return x / self.scale_out + self.center_out

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        if self.folded is None:
            return encode_topk(x, self.W_enc, self.b_enc, self.config.k)
        return encode_topk(x, self.W_enc, self.b_enc, self.config.k, "decoder_norm", 1 / self.folded)

    def fold(self, norms: Float[Tensor, " d_sae"]) -> None:
        """Selection still ranks by the unfolded u: `folded` holds the factors that u is divided by to compare."""
        super().fold(norms)
        self._compare_by(norms if self.folded is None else self.folded * norms)

    def _compare_by(self, folded: Float[Tensor, " d_sae"]) -> None:
        self.folded, self.selection_rule = folded, FOLDED_SELECTION

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """State dicts that were never folded (all of the first version) have no `folded`."""
        if f"{prefix}folded" in state_dict and self.folded is None:
            self._compare_by(torch.ones_like(self.center_out[:1]).repeat(self.d_sae))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def decoder(self, source: int = -1) -> tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, ""]]:
        return self.W_dec, self.scale_out
