"""CSR, contrastive sparse representation (Wen et al. 2025, "Beyond Matryoshka: revisiting sparse coding for adaptive
representation", arXiv 2503.01776, and its code): a sparse representation of embeddings that is also trained to tell them apart.

    u = W (x - b_dec) + b_enc,   z(k) = ReLU(TopK(u)),   x_hat(k) = W^T z(k) + b_dec,   W = W_enc = W_dec
    L = FVU(k) + FVU(4 k) / 8 + auxk_alpha * AuxK + contrast * InfoNCE
    InfoNCE = -mean_t log( exp(s_tt / T) / sum_r exp(s_tr / T) ),   s_tr = cos(z_t, z'_r) over the rows r of the batch

z' is z(k) of a second view of each item: `y` of a `Batch(x, y)` of tensors, or x with coordinates dropped (`view_dropout`). With
neither z' is z, as in the authors' code for images: then s_tt is 1 whatever the weights, and the term does nothing but push
different items apart (a uniformity loss). For inputs of variance 1 per dimension FVU is the authors' MSE. Rows of norm 1 and
`view_dropout` are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.distributed import Ranks
from saelab.kernels.decode import decode_error
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import info_nce, total_variance
from saelab.saes.config import TURNS_OFF, check_config, check_k
from saelab.saes.selection import SelectionSAE
from saelab.saes.step import Batch, Loss, StepInfo
from saelab.saes.topk import TopKSAE, as_topk
from saelab.validation import check_at_least, check_positive

_VIEWS = 6 << 29
"""Added to the step, so that views share no random numbers with weights or data."""


@dataclass(frozen=True)
class CSRConfig:
    """A dictionary of `d_sae` features of which at most `k` fire per item."""

    aux: ClassVar[str] = "auxk"

    d_sae: int
    """Number of features; the authors use 4 times the width of the embedding."""
    k: int = 32
    """Features kept per item (L0)."""
    contrast: float = 0.1
    """Weight of the contrastive term; 0 turns it off."""
    temperature: float = 0.2
    """Cosines are divided by it in the contrastive term."""
    view_dropout: float = 0.0
    """Fraction of the coordinates that the second view of an item lacks; at 0 without other views the two views are one."""
    auxk_alpha: float = 1 / 32
    """Weight of the aux loss that revives dead features (Gao et al. 2024, Appendix A.2)."""
    k_aux: int | None = None
    """Features used per item by the aux loss; None means d_in // 2."""
    normalize: str = "center_and_scale"
    """Input normalisation: "center_and_scale", "scale" or "none"; stored with the SAE."""

    def __post_init__(self) -> None:
        check_config(self)
        check_k(self)
        check_at_least(self, 1, "k_aux")
        check_at_least(self, 0, "contrast", "auxk_alpha", fix=TURNS_OFF)
        check_positive(self, "temperature", fix="; the paper's is 0.2")
        if not 0 <= self.view_dropout < 1:
            raise ValueError(f"view_dropout={self.view_dropout} must be at least 0 and below 1; 0 drops nothing.")


class CSRSAE(SelectionSAE):
    """TopK with one matrix for encoder and decoder, trained with a contrastive term between items."""

    variant = "csr"
    Config = CSRConfig
    config: CSRConfig
    tied = True
    takes_view = True
    short_preset: ClassVar[dict[str, Any]] = {}
    selection_rule = "the k largest u of the item, where positive"

    def make_weights(self, rows: Float[Tensor, "d_sae d_in"]) -> None:
        self.W_dec = nn.Parameter(rows)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(self.d_sae)), nn.Parameter(torch.zeros(self.d_in))

    @property
    def W_enc(self) -> Float[Tensor, "d_sae d_in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The encoder: an alias of `W_dec`."""
        return self.W_dec

    @property
    def weight_decay(self) -> dict[nn.Parameter, float]:
        return {}

    @classmethod
    def peak_l0(cls, config: CSRConfig) -> float:
        return 5 * config.k

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return self._largest(x, self.config.k)

    def _largest(self, x: Tensor, k: int) -> SparseActs:
        return encode_topk(x, self.W_dec, self.b_enc, min(k, self.d_sae), center=self.b_dec)

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        loss = super().loss(Batch(batch.x, batch.x), info)
        error, _ = decode_error(self._largest(self.normalize(batch.x), 4 * self.config.k), *self.rows[1:], loss.y)
        terms = loss.terms | {"multi_topk": error / total_variance(loss.y, info.ranks)}
        total = loss.total + terms["multi_topk"] / 8
        if self.config.contrast:
            view = self._view(batch, loss, info)
            terms["info_nce"] = info_nce(loss.feature_acts, view, self.config.temperature, info.ranks)
            total = total + self.config.contrast * terms["info_nce"]
        return loss._replace(total=total, terms=terms)

    def as_exported(self) -> TopKSAE:
        return as_topk(self)

    def _view(self, batch: Batch, loss: Loss, info: StepInfo) -> SparseActs:
        """The feature activations of the second view of each item."""
        if batch.y is batch.x and not self.config.view_dropout:
            return loss.feature_acts
        view = loss.y if batch.y is batch.x else self.normalize(batch.y)
        if self.config.view_dropout:
            kept = kept_coordinates(len(view), self.d_in, self.config.view_dropout, info.step, info.ranks).to(view)
            view = self.b_dec + (view - self.b_dec) * kept / (1 - self.config.view_dropout)
        return self._largest(view, self.config.k)


def kept_coordinates(n: int, d_in: int, dropout: float, step: int, ranks: Ranks) -> Float[Tensor, "n d_in"]:
    """1 for the coordinates of this rank's `n` rows that a step keeps, else 0; the same however many ranks share the batch."""
    total = ranks.global_batch_size(n)
    generator = torch.Generator().manual_seed(_VIEWS + step)
    kept = torch.rand(total, d_in, generator=generator, dtype=torch.float32) >= dropout
    return kept[ranks.sharing(total).local_rows].float()
