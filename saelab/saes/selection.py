"""Base of the SAEs that are sparse by selecting among pre-activations (TopK, BatchTopK, Feature Choice, ...):

    L = FVU + auxk_alpha * aux,   FVU = |x - x_hat|^2 / |x - mean(x)|^2 over the batch

where the aux loss trains features that never fire (AuxK) or fire too rarely (aux_zipf) to model the residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.kernels.decode import decode_error
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import auxk, total_variance
from saelab.saes.base import SAE
from saelab.saes.config import TURNS_OFF, check_config, check_k
from saelab.saes.step import Batch, Loss, StepInfo
from saelab.saes.zipf import Density, underused
from saelab.validation import check_at_least


@dataclass(frozen=True)
class SelectionConfig:
    """A dictionary of `d_sae` features of which `k` fire per token, exactly or on average."""

    d_sae: int
    """Number of features."""
    k: int = 32
    """Features kept per token (L0)."""
    auxk_alpha: float = 1 / 32
    """Weight of the aux loss that revives dead features (Gao et al. 2024, Appendix A.2)."""
    k_aux: int | None = None
    """Features used per token by the aux loss; None means d_in // 2."""
    aux: Literal["auxk", "aux_zipf"] = "auxk"
    """Features that the aux loss trains: dead ones; with "aux_zipf" also any below a tenth of their density under Zipf's law."""
    encoder_decay: float = 0.0
    """AdamW weight decay of `W_enc`. About 1 helps in short runs of several epochs, which then memorise fewer rows. At a learning
    rate of 3e-3 a decay of 1 halves a row without gradient every 231 steps: use 0 in long runs or if features are rare."""
    normalize: str = "center_and_scale"
    """Input normalisation: "center_and_scale", "scale" or "none"; stored with the SAE."""

    def __post_init__(self) -> None:
        check_config(self)
        check_k(self)
        check_at_least(self, 1, "k_aux")
        check_at_least(self, 0, "auxk_alpha", "encoder_decay", fix=TURNS_OFF)


class SelectionSAE(SAE):
    """`select` returns the feature activations of a training batch; unless overridden, the same as at inference."""

    extension_points = SAE.extension_points | {
        "select",
        "rebuild",
        "decoded",
        "aux_term",
        "aux_norms",
        "zipf_law",
        "rows",
        "signed",
        "trains_in_model",
    }
    config: Any
    short_preset: ClassVar[dict[str, Any]] = {"encoder_decay": 1.0}
    signed: ClassVar[bool] = False
    """Whether feature activations may be negative (the aux loss then ranks by magnitude, without a ReLU)."""
    trains_in_model: ClassVar[bool] = True
    """Whether `decode` of the activations that `loss` returns is the reconstruction of what was read, so that the SAE can be
    trained spliced into its model (`saelab.finetune`)."""

    def __init__(self, config: Any, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.density = Density(self.d_sae) if config.aux == "aux_zipf" else None

    @classmethod
    def expected_l0(cls, config: Any) -> float | None:
        return config.k

    @classmethod
    def has_dense_aux(cls, config: Any) -> bool:
        return config.auxk_alpha > 0

    @property
    def weight_decay(self) -> dict[nn.Parameter, float]:
        return {self.W_enc: self.config.encoder_decay} if self.config.encoder_decay else {}

    @property
    def rows(self) -> tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, "d_sae d_out"], Float[Tensor, " d_out"]]:
        """`W_enc`, `W_dec` and `b_dec` as the kernels read them: one row per feature."""
        return self.W_enc, self.W_dec, self.b_dec

    @property
    def zipf_law(self) -> tuple[float, float]:
        """Exponent and shift of the law that aux_zipf compares feature densities with."""
        return 1.0, 0.0

    def select(self, x: Float[Tensor, "batch d_in"], info: StepInfo) -> SparseActs:
        """Feature activations of a normalised training batch."""
        return self.encode_normalized(x)

    def rebuild(
        self, feature_acts: SparseActs, target: Float[Tensor, "batch d_out"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_out"]]:
        """Squared error of the reconstruction, summed over the batch, and reconstruction minus target, detached."""
        return decode_error(feature_acts, *self.rows[1:], target)

    def decoded(self, summed: Float[Tensor, "n width"]) -> Float[Tensor, "n d_out"]:
        """What sums of `rows` times feature activations decode to, without the bias: themselves, where the decoder is linear."""
        return summed

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        return self.loss_of(x, target, self.select(x, info), info)

    def loss_of(
        self,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        feature_acts: SparseActs,
        info: StepInfo,
    ) -> Loss:
        """The loss of a normalised batch with these feature activations."""
        error, residual = self.rebuild(feature_acts, self.sparse_target(x, target))
        terms = {"fvu": error / total_variance(target, info.ranks)}
        terms |= self.aux_term(x, residual, feature_acts, info)
        aux = self.config.auxk_alpha * terms[self.config.aux] if self.config.aux in terms else 0.0
        return Loss(terms["fvu"] + aux, feature_acts, residual, target, terms)

    def aux_term(self, x: Tensor, residual: Tensor, feature_acts: SparseActs, info: StepInfo) -> dict[str, Tensor]:
        """The aux loss under its name; empty if it is off or no feature needs it."""
        centered, helped = x if self.pre_bias is None else x - self.pre_bias, self.helped(feature_acts, info)
        if not self.config.auxk_alpha:  # no rows are gathered for it
            return {}
        W_enc, W_dec, _ = self.rows
        return self.aux_of(helped, centered, W_enc[helped], W_dec[helped], residual, info)

    def aux_of(
        self, helped: Tensor, centered: Tensor, W_enc: Tensor, W_dec: Tensor, residual: Tensor, info: StepInfo
    ) -> dict[str, Tensor]:
        """The aux loss of the features `helped`: their weights, inputs minus their bias, and the residual they write."""
        if not self.config.auxk_alpha or not len(helped):
            return {}
        k_aux = self.config.k_aux or max(self.d_in // 2, 1)
        norms = self.aux_norms(info)
        norms = None if norms is None else norms[helped]
        rows = W_enc, self.b_enc[helped], W_dec
        aux = auxk(centered, -residual, *rows, k_aux, self.signed, info.ranks, norms, self.decoded)
        return {self.config.aux: aux}

    def aux_norms(self, info: StepInfo) -> Float[Tensor, " d_sae"] | None:
        """Factors on pre-activations when the aux loss ranks them; None for no factors."""
        return None

    def helped(self, feature_acts: SparseActs, info: StepInfo) -> Int[Tensor, " n"]:
        """The features that the aux loss trains."""
        if self.density is None:
            return info.dead.nonzero().squeeze(1)
        self.density.update(feature_acts, info.ranks)
        batch = info.ranks.global_batch_size(feature_acts.batch)
        if info.rules < 2:
            return underused(self.density.mean, self.config.k * max(batch, 1), batch).nonzero().squeeze(1)
        rare = underused(self.density.mean, self.config.k * max(batch, 1), batch, *self.zipf_law)
        return (info.dead | rare).nonzero().squeeze(1)
