"""BatchTopK transcoder: the encoder, the selection and the loss of `batch_topk.py` (Bussmann et al. 2024, arXiv 2412.06410),
predicting another hook (`transcoding.py`; Dunefsky, Chlenski & Nanda 2024):

    z = ReLU(BatchTopK(W_enc x + b_enc)),   y_hat = W_dec z + b_dec [+ W_skip x],   L = FVU(y, y_hat) + auxk_alpha * AuxK

One threshold holds for all features until decoder norms are folded; then each has its own, which is that times its norm.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from saelab.saes.batch_topk import BatchTopKConfig, BatchTopKSAE
from saelab.saes.transcoding import Transcoding


@dataclass(frozen=True)
class BatchTopKTranscoderConfig(BatchTopKConfig):
    """A dictionary of `d_sae` features from one hook to another, of which on average `k` fire per token."""

    hook_name_out: str | None = None
    """Hook to predict; None means the one that is read."""
    skip: bool = False
    """Add a linear map from x to y beside the features."""


class BatchTopKTranscoderSAE(Transcoding, BatchTopKSAE):
    """Keeps the k B largest pre-activations of the batch and predicts another hook. `threshold` is `(d_sae,)`."""

    variant = "batch_topk_transcoder"
    Config = BatchTopKTranscoderConfig
    config: BatchTopKTranscoderConfig

    def __init__(self, config: BatchTopKTranscoderConfig, d_in: int, seed: int = 0, d_out: int | None = None) -> None:
        super().__init__(config, d_in, seed, d_out)
        self.threshold = self.threshold.repeat(self.d_sae)
        self.n_observed = self.n_observed.repeat(self.d_sae)

    def fold(self, norms: Float[Tensor, " d_sae"]) -> None:
        super().fold(norms)
        self.threshold.mul_(norms)
