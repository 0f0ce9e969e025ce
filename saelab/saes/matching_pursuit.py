"""Matching pursuit SAE (Costa et al. 2025, "From flat to hierarchical: extracting sparse representations with matching
pursuit", arXiv 2506.03093): the encoder is the decoder, asked again and again about what is still unexplained:

    r_0 = x - b_dec;   k times:  i = argmax_i <r, d_i>,  a = <r, d_i>,  z_i += a,  r -= a d_i;   x_hat = W_dec z + b_dec,
    L = FVU + auxk_alpha * aux

Rows d_i have norm 1, so |r|^2 falls by a^2 a step. A token stops early once no row points its way, or |r| is small; with
`signed` the row of largest |<r, d_i>| is taken, and codes may be negative. A feature may be chosen again: its codes add up.
Gradients go through a and d_i at every step, the choice i is constant. For the aux loss each token's pursuit takes one more
step among dead features alone (ours: AuxK of Gao et al. 2024, Appendix A.2, with k_aux = 1 and the residual as input).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.arguments import check_integer
from saelab.kernels.decode import decode
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.sampled_product import sampled_product
from saelab.kernels.sparse_acts import SparseActs, offsets_of
from saelab.losses import auxk, sum_of_squares, total_variance
from saelab.saes.base import SAE, Batch, Loss, StepInfo, check_config


@dataclass(frozen=True)
class MatchingPursuitConfig:
    """A dictionary of `d_sae` features of which at most `k` fire on a token, found one after another."""

    d_sae: int
    """Number of features."""
    k: int = 16
    """Steps of the pursuit; time grows with it."""
    signed: bool = False
    """Let codes be negative: the largest |<r, d_i>| is chosen."""
    residual_threshold: float = 0.0
    """Stop a token once its residual is shorter than this share of sqrt(d_in), the inputs' root-mean-square norm."""
    auxk_alpha: float = 1 / 32
    """Weight of the aux loss that revives dead features."""
    normalize: str = "center_and_scale"
    """Input normalisation: "center_and_scale", "scale" or "none"; stored with the SAE."""

    def __post_init__(self) -> None:
        check_config(self)
        check_integer("k", self.k, 1)
        for name in ("residual_threshold", "auxk_alpha"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 turns it off.")


class MatchingPursuitSAE(SAE):
    """Takes the best feature, subtracts it, and looks again."""

    variant = "matching_pursuit"
    Config = MatchingPursuitConfig
    config: MatchingPursuitConfig
    rule = "k times the largest <r, d_i>, where positive, which is then taken from r"

    def make_weights(self, rows: Float[Tensor, "d_sae d_in"]) -> None:
        self.W_dec, self.b_dec = nn.Parameter(rows), nn.Parameter(torch.zeros(self.d_in))

    @property
    def W_enc(self) -> Float[Tensor, "d_sae d_in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The dictionary: encoder and decoder are one."""
        return self.W_dec

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return self._pursue(x, self.config.k)[0]

    def encode_in_steps(self, x: Float[Tensor, ...], n_steps: int) -> SparseActs:
        """Codes of raw activations after another number of steps than `config.k`; more never reconstruct worse."""
        check_integer("n_steps", n_steps, 1)
        return self._pursue(self.normalize(x), n_steps)[0]

    def _pursue(self, x: Float[Tensor, "batch d_in"], n_steps: int) -> tuple[SparseActs, Float[Tensor, "batch d_in"]]:
        """Codes and what they leave unexplained."""
        residual, no_bias = x - self.b_dec, self.W_dec.new_zeros(self.d_sae)
        choices: list[SparseActs] = []
        for _ in range(n_steps):
            best = encode_topk(residual, self.W_dec, no_bias, 1, "magnitude" if self.config.signed else "value")
            if self.config.residual_threshold:
                best = best.where(self._unfinished(residual)[best.rows])
            if not best.nnz:
                break
            choices.append(best)
            residual = residual - decode(best, self.W_dec)
        return _sum(choices, best), residual

    def _unfinished(self, residual: Float[Tensor, "batch d_in"]) -> Tensor:
        """Rows that are longer than the threshold; pair-wise products, so that a row's answer is its own."""
        ids = torch.arange(len(residual) + 1, device=residual.device)
        return sampled_product(residual, residual, ids[:-1], ids) > self.d_in * self.config.residual_threshold**2

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        acts, unexplained = self._pursue(x, self.config.k)
        if target is not x:
            unexplained = unexplained + (target - x)
        terms = {"fvu": sum_of_squares(unexplained) / total_variance(target, info.ranks)}
        residual, total = unexplained.detach(), terms["fvu"]
        chosen = info.dead.nonzero().squeeze(1)
        if self.config.auxk_alpha and len(chosen):
            rows = self.W_dec[chosen]
            no_bias = rows.new_zeros(len(chosen))
            terms["auxk"] = auxk(residual, residual, rows, no_bias, rows, 1, self.config.signed, info.ranks)
            total = total + self.config.auxk_alpha * terms["auxk"]
        return Loss(total, acts, -residual, target, terms)


def _sum(choices: list[SparseActs], like: SparseActs) -> SparseActs:
    """The sum of codes; those of one feature are added in the order of the list, zeros are dropped."""
    if len(choices) < 2:
        return (choices or [like])[0]
    d_sae, batch = like.d_sae, like.batch
    places, where = torch.cat([c.rows * d_sae + c.features for c in choices]).unique(return_inverse=True)
    values = choices[0].values.new_zeros(len(places))
    for choice, at in zip(choices, where.split([c.nnz for c in choices]), strict=True):
        values = values.index_add(0, at, choice.values)
    counts = torch.bincount(places // d_sae, minlength=batch)
    total = SparseActs(values, places % d_sae, offsets_of(counts), d_sae)
    return total.where(values != 0)
