"""ReLU transcoder, the kind of most released ones (SAELens' `transcoder` and `skip_transcoder`, those of circuit-tracer): the
encoder and the penalty of `relu.py`, predicting another hook (`transcoding.py`):

    z = ReLU(W_enc x + b_enc),   y_hat = W_dec z + b_dec [+ W_skip x],   L = mean_t(|y - y_hat|^2 + lambda sum_i z_i |d_i|)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saelab.saes.relu import ReLUConfig, ReLUSAE
from saelab.saes.transcoding import Transcoding

INIT_NORM = 1.0
"""Of a decoder row: at 0, where the other transcoders start, the penalty `z |d|` would hold it."""


@dataclass(frozen=True)
class ReLUTranscoderConfig(ReLUConfig):
    """A dictionary of `d_sae` features from one hook to another; the L1 penalty sets how many fire per token."""

    hook_name_out: str | None = None
    """Hook to predict; None means the one that is read."""
    skip: bool = False
    """Add a linear map from x to y beside the features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_pre_bias(self.pre_bias)
        if self.resample_every is not None:
            raise ValueError(
                f"resample_every={self.resample_every} is for SAEs that reconstruct what they read: leave it at None."
            )


class ReLUTranscoderSAE(Transcoding, ReLUSAE):
    """Keeps every positive pre-activation and predicts another hook."""

    variant = "relu_transcoder"
    Config = ReLUTranscoderConfig
    config: ReLUTranscoderConfig

    def __init__(self, config: ReLUTranscoderConfig, d_in: int, seed: int = 0, d_out: int | None = None) -> None:
        super().__init__(config, d_in, seed, d_out)
        rows = torch.randn(self.W_dec.shape, generator=torch.Generator().manual_seed(seed + 1))
        self.W_dec.data.copy_(INIT_NORM * rows / rows.norm(dim=1, keepdim=True))


def check_no_pre_bias(pre_bias: bool) -> None:
    """Raise `ValueError` if a transcoder should subtract `b_dec`, which has the width of its output, from its input."""
    if pre_bias:
        raise ValueError("pre_bias=True is for SAEs that reconstruct what they read: a transcoder has no pre-bias.")
