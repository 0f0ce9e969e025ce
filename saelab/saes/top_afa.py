"""top-AFA SAE (Lee et al. 2025, "Evaluating and designing sparse autoencoders by approximating quasi-orthogonality", and its
code): the norm of the input decides how many features a token gets. Where decoder rows of norm 1 are nearly orthogonal,
`|z|` is about `|x - b_dec|`, the approximate feature activation (AFA). With u sorted in descending order:

    u = ReLU(W_enc (x - b_dec) + b_enc),   k(x) = argmin_m | |(u_1, ..., u_m)| - |x - b_dec| |,   z = the k(x) largest u,
    L = FVU + afa_coefficient * d_in * sum_t (|z| - |x - b_dec|)^2 / sum_t |x - mean(x)|^2 + auxk_alpha * AuxK

For inputs of variance 1 per dimension this is the authors' loss, except that theirs takes |x| (`center_norm=False`) and that
their code has no b_enc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.primitives import sddmm
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import sum_of_squares, total_variance
from saelab.saes.config import TURNS_OFF, check_config
from saelab.saes.selection import SelectionSAE
from saelab.saes.step import Batch, Loss, StepInfo
from saelab.validation import check_at_least


@dataclass(frozen=True)
class TopAFAConfig:
    """A dictionary of `d_sae` features; the input's norm decides how many of them fire on a token."""

    aux: ClassVar[str] = "auxk"

    d_sae: int
    """Number of features."""
    afa_coefficient: float = 1 / 32
    """Weight of the difference between the norms of feature activations and input; the authors tried 1/128 to 1/16."""
    center_norm: bool = True
    """Compare with |x - b_dec| in the loss too; False: with |x|, as the authors' code does."""
    auxk_alpha: float = 1 / 32
    """Weight of the aux loss that revives dead features (Gao et al. 2024, Appendix A.2)."""
    k_aux: int | None = None
    """Features used per token by the aux loss; None means d_in // 2."""
    encoder_decay: float = 0.0
    """AdamW weight decay of `W_enc`, as in TopK."""
    normalize: str = "center_and_scale"
    """Input normalisation, stored with the SAE; the authors use "layer_norm"."""

    def __post_init__(self) -> None:
        check_config(self)
        check_at_least(self, 1, "k_aux")
        check_at_least(self, 0, "afa_coefficient", "auxk_alpha", "encoder_decay", fix=TURNS_OFF)


class TopAFASAE(SelectionSAE):
    """Keeps the largest pre-activations of each token, as many as bring their norm nearest to that of the input."""

    variant = "top_afa"
    Config = TopAFAConfig
    config: TopAFAConfig
    selection_rule = "the largest u of the token, where positive, as many as bring |z| nearest to |x - b_dec|"

    @classmethod
    def expected_l0(cls, config: Any) -> None:
        return None

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        positive = encode_threshold(x, self.W_enc, self.b_enc, center=self.b_dec)
        with torch.no_grad():
            centered = x - self.b_dec
            ids = torch.arange(len(x) + 1, device=x.device)
            norms = sddmm(centered, centered, ids[:-1], ids).sqrt()  # a row's is independent of the rest of the batch
        return positive.where(nearest_norm(positive, norms))

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        loss = super().loss(batch, info)
        x, target = self.normalized(batch)
        norms = (x - self.b_dec if self.config.center_norm else x).norm(dim=1)
        gap = loss.feature_acts.to_dense().norm(dim=1) - norms
        afa = self.d_in * sum_of_squares(gap) / total_variance(target, info.ranks)
        return loss._replace(total=loss.total + self.config.afa_coefficient * afa, terms=loss.terms | {"afa": afa})


def nearest_norm(positive: SparseActs, norms: Float[Tensor, " batch"]) -> Bool[Tensor, " nnz"]:
    """Which entries to keep: each row's largest, at least one, as many as bring their norm nearest to the row's `norms`.

    Of two counts that are equally near the lower is taken; ties between values go to the lowest feature id.
    """
    counts = positive.counts
    width = max(int(counts.max()) if len(counts) else 0, 1)
    present = torch.arange(width, device=norms.device) < counts[:, None]
    table = positive.values.detach().new_zeros(present.shape).masked_scatter(present, positive.values.detach())
    ordered, order = table.sort(dim=1, descending=True, stable=True)
    reached = ordered.double().square().cumsum(1).sqrt()  # (batch, width), ascending
    below = (reached < norms[:, None]).sum(1, keepdim=True)  # the first that is not below, or the last that is
    before, after = (reached.gather(1, (below + shift).clamp(0, width - 1)) for shift in (-1, 0))
    kept = below + (after - norms[:, None] < norms[:, None] - before)
    kept = torch.where(below == 0, 1, torch.where(below == width, width, kept))
    first = torch.arange(width, device=norms.device) < kept
    return torch.zeros_like(present).scatter(1, order, first)[present]
