"""Fused steps of TopK SAEs that rank pairs by something else than their value: by magnitude, or by value times decoder norm."""

from __future__ import annotations

from saelab.kernels.triton_backend.step.select import Scoring
from saelab.training.fused_step import FusedStep


class FusedByNorm(FusedStep):
    """TopK with `score="decoder_norm"`."""

    rough = False

    def scoring(self) -> Scoring:
        return Scoring(norms=self.sae.decoder_norms)


class FusedAbsTopK(FusedStep):
    """AbsTopK: magnitudes are ranked, and signs kept, in AuxK too."""

    rough = False

    def scoring(self) -> Scoring:
        return Scoring(magnitude=True)
