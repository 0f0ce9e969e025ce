"""Fused steps of TopK SAEs that rank pairs by something else than their value: by magnitude, or by value times decoder norm."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.step.select import Scoring
from saelab.kernels.triton_backend.step.update import RECORD
from saelab.losses import auxk
from saelab.training.fused_step import FusedStep


class FusedByNorm(FusedStep):
    """TopK with `score="decoder_norm"`."""

    rough = False

    def scoring(self) -> Scoring:
        return Scoring(norms=self.sae.decoder_norms)


class FusedAbsTopK(FusedStep):
    """AbsTopK: magnitudes are ranked, and signs kept."""

    rough = False

    def scoring(self) -> Scoring:
        return Scoring(magnitude=True)

    def _add_aux(self, dead: Int[Tensor, " n_dead"], residual: Float[Tensor, "batch d_in"]) -> None:
        """As for TopK, with signed activations."""
        sae, config = self.sae, self.sae.config
        with torch.enable_grad():
            W_enc, W_dec, b_enc = (p.detach()[dead].requires_grad_() for p in (sae.W_enc, sae.W_dec, sae.b_enc))
            k_aux = config.k_aux or max(sae.d_in // 2, 1)
            loss = auxk(self.rows.x, -residual, W_enc, b_enc, W_dec, k_aux, signed=True)
            gradients = torch.autograd.grad(config.auxk_alpha * loss, (W_enc, W_dec, b_enc))
        for total, more in zip(self._gradients, gradients, strict=True):
            total.index_add_(0, dead, more)
        self.record[RECORD.index("auxk")] = loss.detach()
