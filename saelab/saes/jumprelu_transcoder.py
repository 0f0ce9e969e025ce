"""JumpReLU transcoder (Gemma Scope, Lieberum et al. 2024; with `skip`, as in Gemma Scope 2): the encoder and the loss of
`jumprelu.py`, predicting another hook (`transcoding.py`):

    z = u * H(u - theta),   u = W_enc x + b_enc,   y_hat = W_dec z + b_dec [+ W_skip x]
"""

from __future__ import annotations

from dataclasses import dataclass

from saelab.saes.jumprelu import JumpReLUConfig, JumpReLUSAE
from saelab.saes.relu_transcoder import check_no_pre_bias
from saelab.saes.transcoding import Transcoding


@dataclass(frozen=True)
class JumpReLUTranscoderConfig(JumpReLUConfig):
    """A dictionary of `d_sae` features from one hook to another, each with its own learned threshold."""

    hook_name_out: str | None = None
    """Hook to predict; None means the one that is read."""
    skip: bool = False
    """Add a linear map from x to y beside the features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_pre_bias(self.pre_bias)


class JumpReLUTranscoderSAE(Transcoding, JumpReLUSAE):
    """Keeps pre-activations above the threshold of their feature and predicts another hook."""

    variant = "jumprelu_transcoder"
    Config = JumpReLUTranscoderConfig
    config: JumpReLUTranscoderConfig
