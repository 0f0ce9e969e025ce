"""Skip transcoder (Paulo, Shabalin & Belrose 2025, "Transcoders beat sparse autoencoders for interpretability"): the TopK
transcoder of `transcoder.py` with a linear skip,

    y_hat = W_dec z + b_dec + W_skip x
"""

from __future__ import annotations

from dataclasses import dataclass

from saelab.saes.transcoder import TranscoderConfig, TranscoderSAE


@dataclass(frozen=True)
class SkipTranscoderConfig(TranscoderConfig):
    """A transcoder's config; the skip connection has no settings of its own."""


class SkipTranscoderSAE(TranscoderSAE):
    """A transcoder with a linear skip connection."""

    variant = "skip_transcoder"
    Config = SkipTranscoderConfig

    @property
    def has_skip(self) -> bool:
        return True
