"""BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410, eqs. 4 and 5): keeps the k B largest pre-activations of a
batch of B tokens, so that hard tokens get more features than easy ones:

    z = ReLU(BatchTopK(W_enc (x - b_dec) + b_enc)),   x_hat = W_dec z + b_dec,   L = FVU + auxk_alpha * AuxK

At inference a threshold replaces the selection over the batch (`threshold.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from saelab.kernels.encode_batch_topk import encode_batch_topk
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.annealing import annealed_k, check_k_start
from saelab.saes.config import LATER
from saelab.saes.selection import SelectionConfig
from saelab.saes.step import StepInfo
from saelab.saes.threshold import ThresholdSAE, smallest


@dataclass(frozen=True)
class BatchTopKConfig(SelectionConfig):
    """A dictionary of `d_sae` features of which on average `k` fire per token."""

    k_start: int | None = field(default=None, metadata=LATER)
    """Features per token at the start of training; falls to `k` over the first half of the run. None trains with `k` only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k_start(self)


class BatchTopKSAE(ThresholdSAE):
    """Keeps the k B largest pre-activations of the batch."""

    variant = "batch_topk"
    Config = BatchTopKConfig

    @classmethod
    def peak_l0(cls, config: BatchTopKConfig) -> float:
        return config.k_start or config.k

    def select(self, x: Float[Tensor, "batch d_in"], info: StepInfo) -> SparseActs:
        n_kept = round(annealed_k(self.config, info) * info.ranks.global_batch_size(len(x)))
        feature_acts = encode_batch_topk(
            x, self.W_enc, self.b_enc, n_kept, center=self.pre_bias, global_pairs=self.global_pairs(info)
        )
        self.observe(smallest(feature_acts.values), info)
        return feature_acts
