"""Matching pursuit SAE (Costa et al. 2025, "From flat to hierarchical: extracting sparse representations with matching
pursuit", arXiv 2506.03093): the encoder is the decoder, applied repeatedly to the residual:

    r_0 = x - b_dec;   k times:  i = argmax_i <r, d_i>,  a = <r, d_i>,  z_i += a,  r -= a d_i;   x_hat = W_dec z + b_dec,
    L = FVU + auxk_alpha * aux

Rows d_i have norm 1, so |r|^2 falls by a^2 per step. A token stops early once no <r, d_i> is positive, or |r| is small; with
`signed` the row of largest |<r, d_i>| is taken, and activations may be negative. A feature may be chosen again: its activations
add up. Gradients flow through a and d_i at every step; the choice i is constant. The aux loss takes one more pursuit step per
token among dead features only (ours: AuxK of Gao et al. 2024, Appendix A.2, with k_aux = 1 and the residual as input).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saelab.kernels.decode import decode
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.precision import widened
from saelab.kernels.primitives import sddmm, spmm, spmm_transposed
from saelab.kernels.sparse_acts import SparseActs, offsets_of, summed
from saelab.losses import auxk, sum_of_squares, total_variance
from saelab.saes.base import SAE
from saelab.saes.config import LATER, TURNS_OFF, check_config
from saelab.saes.step import RULES, Batch, Loss, StepInfo
from saelab.validation import check_at_least, check_integer


@dataclass(frozen=True)
class MatchingPursuitConfig:
    """A dictionary of `d_sae` features of which at most `k` fire per token, chosen one after another."""

    d_sae: int
    """Number of features."""
    k: int = 16
    """Steps of the pursuit; compute time is proportional to it."""
    signed: bool = False
    """Allow negative activations: the largest |<r, d_i>| is chosen."""
    residual_threshold: float = 0.0
    """Stop for a token once its residual norm is below this fraction of sqrt(d_in), the inputs' root-mean-square norm."""
    stop_on_duplicate: bool = field(default=False, metadata=LATER)
    """Stop for a token once it chooses a feature a second time, which still counts (SAELens' `stop_on_duplicate_support`)."""
    auxk_alpha: float = 1 / 32
    """Weight of the aux loss that revives dead features."""
    normalize: str = "center_and_scale"
    """Input normalisation: "center_and_scale", "scale" or "none"; stored with the SAE."""

    def __post_init__(self) -> None:
        check_config(self)
        check_at_least(self, 1, "k")
        check_at_least(self, 0, "residual_threshold", "auxk_alpha", fix=TURNS_OFF)


class MatchingPursuitSAE(SAE):
    """Repeatedly takes the best-matching feature and subtracts it from the residual."""

    variant = "matching_pursuit"
    Config = MatchingPursuitConfig
    config: MatchingPursuitConfig
    tied = True
    selection_rule = "k times the largest <r, d_i>, where positive, which is then taken from r"

    @classmethod
    def expected_l0(cls, config: Any) -> float:
        return config.k

    @classmethod
    def has_dense_aux(cls, config: Any) -> bool:
        return config.auxk_alpha > 0

    def make_weights(self, rows: Float[Tensor, "d_sae d_in"]) -> None:
        self.W_dec, self.b_dec = nn.Parameter(rows), nn.Parameter(torch.zeros(self.d_in))

    @property
    def W_enc(self) -> Float[Tensor, "d_sae d_in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The dictionary: an alias of `W_dec`."""
        return self.W_dec

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return self._pursue(x, self.config.k)[0]

    def encode_in_steps(self, x: Any, n_steps: int) -> SparseActs:
        """Feature activations after `n_steps` pursuit steps instead of `config.k`; more steps never increase the error."""
        check_integer("n_steps", n_steps, 1)
        return self._pursue(self.checked(self.normalize(x)), n_steps)[0]

    def _pursue(
        self, x: Float[Tensor, "batch d_in"], n_steps: int, rules: int = RULES
    ) -> tuple[SparseActs, Float[Tensor, "batch d_in"]]:
        """Feature activations and residual. Under rules 1 autograd sums the gradient step by step, in a different order."""
        start = x - self.b_dec
        if rules < 2 or not torch.is_grad_enabled():
            choices, residuals = self._choose(start, n_steps)
            return sum_of_choices(choices, self.d_sae, start), residuals[-1]
        with torch.no_grad():
            choices, residuals = self._choose(start, n_steps)
        values = torch.cat([start.new_zeros(0), *(choice.values for choice in choices)])
        W_dec = widened(self.W_dec, start)[0]
        residual, values = Pursuit.apply(start, W_dec, values, residuals, choices)  # pyright: ignore
        chunks = values.split([choice.nnz for choice in choices]) if choices else ()
        choices = [choice.with_values(chunk) for choice, chunk in zip(choices, chunks, strict=True)]
        return sum_of_choices(choices, self.d_sae, start), residual

    def _choose(self, residual: Tensor, n_steps: int) -> tuple[list[SparseActs], list[Tensor]]:
        """The choices of each step, and the residuals before the first step and after each."""
        no_bias = self.W_dec.new_zeros(self.d_sae)
        choices, residuals = [], [residual]
        unfinished = torch.ones(len(residual), dtype=torch.bool, device=residual.device)
        for _ in range(n_steps):
            best = encode_topk(residuals[-1], self.W_dec, no_bias, 1, "magnitude" if self.config.signed else "value")
            if self.config.residual_threshold:
                unfinished &= self._unfinished(residuals[-1])
            if self.config.residual_threshold or self.config.stop_on_duplicate:
                best = best.where(unfinished[best.rows])
            if not best.nnz:
                break
            if self.config.stop_on_duplicate:
                for earlier in choices:
                    again = earlier.rows[earlier.features == _chosen(best, earlier.rows)]
                    unfinished[again] = False
            choices.append(best)
            residuals.append(residuals[-1] - decode(best, self.W_dec))
        return choices, residuals

    def _unfinished(self, residual: Float[Tensor, "batch d_in"]) -> Tensor:
        """Rows whose norm is above the threshold; a row's result is independent of the rest of the batch."""
        ids = torch.arange(len(residual) + 1, device=residual.device)
        return sddmm(residual, residual, ids[:-1], ids) > self.d_in * self.config.residual_threshold**2

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        feature_acts, unexplained = self._pursue(x, self.config.k, info.rules)
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
        return Loss(total, feature_acts, -residual, target, terms)


def _chosen(choice: SparseActs, rows: Tensor) -> Tensor:
    """The feature that `choice` has in each of these rows; -1 for none."""
    by_row = choice.features.new_full((choice.batch,), -1)
    by_row[choice.rows] = choice.features
    return by_row[rows]


def sum_of_choices(choices: list[SparseActs], d_sae: int, like: Float[Tensor, "batch d_in"]) -> SparseActs:
    """The sum of all choices; activations of one feature are added in list order, zeros are dropped."""
    if len(choices) == 1:
        return choices[0]
    if not choices:
        ids = torch.zeros(len(like) + 1, dtype=torch.int64, device=like.device)
        return SparseActs(like.new_zeros(0), ids[:0], ids, d_sae)
    return summed(choices)


class Pursuit(Function):
    """The residual after the last step and the values of all steps, with one sparse gradient of the dictionary.

    With g_t the gradient of r_t and alpha_t = da_t - <g_t, d_i>, a step passes back g_{t-1} = g_t + alpha_t d_i, and row i
    gets alpha_t r_{t-1} - a_t g_t: a sum over (token, step) pairs of rows of r and g, computed once for all steps.
    """

    @staticmethod
    def forward(
        ctx: Any, start: Tensor, W_dec: Tensor, values: Tensor, residuals: list[Tensor], choices: list[SparseActs]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(W_dec, *residuals[:-1])
        ctx.choices = choices
        return residuals[-1].clone(), values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        W_dec, *residuals = ctx.saved_tensors
        g, to_values = grads[0].contiguous(), grads[1].split([choice.nnz for choice in ctx.choices])
        alphas, gradients = [], []
        for choice, to_a in zip(reversed(ctx.choices), reversed(to_values), strict=True):
            alpha = to_a - sddmm(g, W_dec, choice.features, choice.offsets)
            gradients.append(g)
            alphas.append(alpha)
            g = g + spmm(alpha, choice.features, choice.offsets, W_dec)
        if not gradients:
            return g, torch.zeros_like(W_dec), None, None, None
        both = ctx.choices + ctx.choices
        values = torch.cat([*reversed(alphas), *(-choice.values for choice in ctx.choices)])
        offsets = offsets_of(torch.cat([choice.counts for choice in both]))
        pairs = SparseActs(values, torch.cat([choice.features for choice in both]), offsets, len(W_dec))
        to_W_dec = spmm_transposed(pairs, values, torch.cat([*residuals, *reversed(gradients)]))
        return g, to_W_dec, None, None, None
