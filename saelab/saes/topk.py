"""TopK SAE (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3):

    z = ReLU(TopK(W_enc (x - b_dec) + b_enc)),   x_hat = W_dec z + b_dec,   L = FVU + auxk_alpha * AuxK

`multi_topk` adds 1/8 of the FVU with the 4 k largest (section 5.3.1), so that more than k may be kept at inference. With
`select="groupmax"` (sparsify's `activation`) the features form k consecutive groups, of which each keeps its largest u.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from saelab.kernels.decode import decode_error
from saelab.kernels.encode_groupmax import encode_groupmax
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import total_variance
from saelab.saes.annealing import annealed_k, check_k_start
from saelab.saes.config import LATER
from saelab.saes.selection import SelectionConfig, SelectionSAE
from saelab.saes.step import Batch, Loss, StepInfo

GROUPMAX = "the largest u of each of k groups of features, where positive"


@dataclass(frozen=True)
class TopKConfig(SelectionConfig):
    """A dictionary of `d_sae` features of which at most `k` fire per token."""

    multi_topk: bool = False
    """Add 1/8 of the FVU with the 4 k largest pre-activations to the loss."""
    select: Literal["topk", "groupmax"] = field(default="topk", metadata=LATER)
    """"topk": the k largest of all pre-activations; "groupmax": the largest of each of k groups of d_sae / k features."""
    score: Literal["value", "decoder_norm"] = field(default="value", metadata=LATER)
    """What is compared: the pre-activations, or these times the norms of their decoder rows."""
    pre_bias: bool = field(default=True, metadata=LATER)
    """Subtract `b_dec` from the input before the encoder."""
    k_start: int | None = field(default=None, metadata=LATER)
    """Features per token at the start of training; falls to `k` over the first half of the run. None trains with `k` only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self.select, self.d_sae, self.k)
        check_k_start(self)
        if self.k_start is not None and self.select == "groupmax":
            raise ValueError(
                "select='groupmax' makes k groups of features, and k_start changes k; leave k_start at None."
            )


class TopKSAE(SelectionSAE):
    """Keeps the k largest pre-activations of each token."""

    variant = "topk"
    Config = TopKConfig
    config: TopKConfig
    selection_rule = "the k largest u of the token, where positive"

    def __init__(self, config: TopKConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        if config.select == "groupmax":
            self.selection_rule = GROUPMAX
        if config.score == "decoder_norm":
            self.selection_rule = self.selection_rule.replace(" u ", " u |d| ")

    @classmethod
    def peak_l0(cls, config: TopKConfig) -> float:
        return (config.k_start or config.k) * (5 if config.multi_topk else 1)

    @property
    def pre_bias(self) -> Float[Tensor, " d_in"] | None:
        return self.b_dec if self.config.pre_bias else None

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        if self.config.select == "groupmax":
            return encode_groupmax(x, self.W_enc, self.b_enc, self.config.k, self._norms, self.pre_bias)
        return self._best(x, self.config.k)

    def select(self, x: Float[Tensor, "batch d_in"], info: StepInfo) -> SparseActs:
        if self.config.k_start is None:
            return self.encode_normalized(x)
        return self._best(x, round(annealed_k(self.config, info)))

    @property
    def _norms(self) -> Float[Tensor, " d_sae"] | None:
        return self.decoder_norms.detach() if self.config.score == "decoder_norm" else None

    def _best(self, x: Tensor, k: int) -> SparseActs:
        return encode_topk(x, self.W_enc, self.b_enc, k, self.config.score, self._norms, self.pre_bias)

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        loss = super().loss(batch, info)
        if not self.config.multi_topk:
            return loss
        x, target = self.normalized(batch)
        wide = self._best(x, min(4 * round(annealed_k(self.config, info)), self.d_sae))
        error, _ = decode_error(wide, self.W_dec, self.b_dec, target)
        more = error / total_variance(target, info.ranks)
        return loss._replace(total=loss.total + more / 8, terms=loss.terms | {"multi_topk": more})


def check_groups(select: str, d_sae: int, k: int) -> None:
    """Raise `ValueError` if "groupmax" cannot divide `d_sae` features into k groups of one size."""
    if select == "groupmax" and d_sae % k:
        raise ValueError(f"select='groupmax' needs k groups of one size: d_sae={d_sae} is not a multiple of k={k}.")


def as_topk(sae: Any) -> TopKSAE:
    """The TopK SAE with the weights of one that computes the same at inference, which other libraries' formats can hold."""
    topk = TopKSAE(TopKConfig(sae.d_sae, sae.config.k, normalize=sae.config.normalize), sae.d_in)
    state = sae.state_dict()  # without the aliases of tied weights
    kept = {name: state[name] if name in state else getattr(sae, name) for name in topk.state_dict()}
    topk.to(sae.W_dec.dtype).load_state_dict(kept)
    topk.provenance = sae.provenance
    return topk
