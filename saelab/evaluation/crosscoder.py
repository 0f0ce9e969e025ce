"""Comparing two sources of a crosscoder: which features are shared, which are specific to one, and whether that holds up.

`compare_decoders` uses decoder norms only (Kissane et al. 2024; Minder et al. 2025, arXiv 2504.02922). A small norm need
not mean that a source lacks the feature, so `latent_scaling` checks the activations (Minder et al., section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.evaluation.scaling_sums import ScalingSums
from saelab.saes import CrosscoderSAE

CLASSES = ("a only", "shared", "b only", "other")


class DecoderComparison(NamedTuple):
    """The decoders of two sources, a and b, compared feature by feature."""

    norms_a: Float[Tensor, " d_sae"]
    norms_b: Float[Tensor, " d_sae"]
    share_b: Float[Tensor, " d_sae"]
    """`|d_b| / (|d_a| + |d_b|)`; Kissane et al. call 0.3 to 0.7 shared."""
    delta: Float[Tensor, " d_sae"]
    """`((|d_b| - |d_a|) / max(|d_a|, |d_b|) + 1) / 2`: 0 is specific to a, 0.5 shared, 1 specific to b."""
    cosine: Float[Tensor, " d_sae"]
    """Cosine similarity of the two decoder rows."""

    @property
    def classes(self) -> Int[Tensor, " d_sae"]:
        """Indices into `CLASSES`: delta under 0.1, 0.4 to 0.6, over 0.9, and the rest."""
        kind = torch.full(self.delta.shape, 3)
        kind[self.delta < 0.1] = 0
        kind[(self.delta >= 0.4) & (self.delta <= 0.6)] = 1
        kind[self.delta > 0.9] = 2
        return kind

    def counts(self) -> dict[str, int]:
        """Number of features in each class."""
        return dict(zip(CLASSES, torch.bincount(self.classes, minlength=len(CLASSES)).tolist(), strict=True))


@torch.no_grad()
def compare_decoders(sae: CrosscoderSAE, a: int = 0, b: int = -1, units: str = "normalized") -> DecoderComparison:
    """Compare the decoder rows of two sources, in the normalised units of the weights or in "raw" units. NaN where both
    rows are zero."""
    _check_units(units)
    scales = torch.ones_like(sae.scale) if units == "normalized" else sae.scale
    rows_a, rows_b = (sae.W_dec[s].double().cpu() / float(scales[s]) for s in checked_sources(sae, a, b))
    norms_a, norms_b = rows_a.norm(dim=1), rows_b.norm(dim=1)
    delta = ((norms_b - norms_a) / torch.maximum(norms_a, norms_b) + 1) / 2
    cosine = torch.cosine_similarity(rows_a, rows_b, dim=1)
    return DecoderComparison(norms_a, norms_b, norms_b / (norms_a + norms_b), delta, cosine)


class LatentScaling(NamedTuple):
    """For each feature, how much of `z d_b` a source contains: 1 is as much as b's decoder row says, 0 is none. NaN if it
    never fired.

    `beta` of a source is the least-squares factor on `z d_b` that best explains what the other features leave unexplained of
    that source ("error"), or the crosscoder's reconstruction of it ("reconstruction"). Each nu is beta of a over beta of b.
    """

    beta_error_a: Float[Tensor, " d_sae"]
    beta_error_b: Float[Tensor, " d_sae"]
    beta_reconstruction_a: Float[Tensor, " d_sae"]
    beta_reconstruction_b: Float[Tensor, " d_sae"]

    @property
    def nu_error(self) -> Float[Tensor, " d_sae"]:
        """High: a contains the feature although its decoder row there is small (complete shrinkage)."""
        return self.beta_error_a / self.beta_error_b

    @property
    def nu_reconstruction(self) -> Float[Tensor, " d_sae"]:
        """High: other features write the same direction into a (latent decoupling)."""
        return self.beta_reconstruction_a / self.beta_reconstruction_b

    def specific_to_b(self, error: float = 0.2, reconstruction: float = 0.5) -> Tensor:
        """Features that b's activations contain and that are specific to b by the absolute value of both ratios, `(d_sae)`
        bool; thresholds as in Minder et al. (A ratio of -0.9 means that a contains the feature with the opposite sign.)"""
        held = (self.beta_error_b > 0) & (self.beta_reconstruction_b > 0)
        return held & (self.nu_error.abs() < error) & (self.nu_reconstruction.abs() < reconstruction)

    def in_units_of(self, scale_a: float, scale_b: float) -> LatentScaling:
        """The same in raw units (of x and of b's direction), given the scales that normalised the sources."""
        factors = (scale_b / scale_a, 1.0, scale_b / scale_a, 1.0)
        return LatentScaling(*(beta * factor for beta, factor in zip(self, factors, strict=True)))


@torch.no_grad()
def latent_scaling(
    sae: CrosscoderSAE,
    batches: Iterable[Float[Any, "_ n_sources d_in"]],
    a: int = 0,
    b: int = -1,
    units: str = "normalized",
) -> LatentScaling:
    """Latent scaling from one pass over raw activations, with float64 sums. The direction is b's, for both sources.

    `units` are "normalized", in which every source has the same variance, or "raw", those of the models: there the ratios
    of a source that is k times smaller are k times smaller too.
    """
    _check_units(units)
    sources = checked_sources(sae, a, b)
    sums = ScalingSums(sae, sources, sae.W_dec.detach()[sources[1]][None])
    for raw in batches:
        sums.add(raw)
    scales = [1.0 if units == "normalized" else float(sae.scale[source]) for source in sources]
    return LatentScaling(*sums.betas.flatten(0, 2).cpu()).in_units_of(*scales)


def _check_units(units: str) -> None:
    if units not in ("normalized", "raw"):
        raise ValueError(f"units={units!r} must be 'normalized' or 'raw'.")


def checked_sources(sae: CrosscoderSAE, *sources: int) -> list[int]:
    """Non-negative indices. Raises `ValueError` for a source out of range, or the same one twice."""
    found = [source + sae.n_sources if source < 0 else source for source in sources]
    if len(set(found)) < len(found) or not all(0 <= source < sae.n_sources for source in found):
        raise ValueError(
            f"sources {sources} must be two different ones of the {sae.n_sources} that this crosscoder has."
        )
    return found
