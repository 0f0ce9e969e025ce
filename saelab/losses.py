"""Losses and metrics as pure functions of tensors, independent of the SAE classes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from saelab.distributed import SINGLE_PROCESS, Ranks
from saelab.distributed.collectives import gather_rows, global_variance
from saelab.kernels.decode import decode
from saelab.kernels.precision import widened
from saelab.kernels.sparse_acts import SparseActs


class SquaredError(Function):
    """`sum |x - x_hat|^2`; the difference is computed once and reused for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor) -> Tensor:
        residual = x_hat - x
        ctx.save_for_backward(residual)
        return sum_of_squares(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (residual,) = ctx.saved_tensors
        to_x_hat = residual * (2 * grads[0])
        return -to_x_hat if ctx.needs_input_grad[0] else None, to_x_hat if ctx.needs_input_grad[1] else None


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum of squared elements, in one pass and without a temporary tensor."""
    return torch.dot(x.reshape(-1), x.reshape(-1))


def squared_error(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Squared error summed over the batch."""
    return SquaredError.apply(*widened(x, x_hat))  # pyright: ignore[reportReturnType]


def fvu(
    x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"], ranks: Ranks = SINGLE_PROCESS
) -> Float[Tensor, ""]:
    """Fraction of variance unexplained in this batch: `sum |x - x_hat|^2 / sum |x - mean(x)|^2`.

    The denominator is floored at the smallest normal number.
    """
    return squared_error(x, x_hat) / total_variance(x, ranks)


def total_variance(x: Float[Tensor, "batch d_in"], ranks: Ranks = SINGLE_PROCESS) -> Float[Tensor, ""]:
    """`sum |x - mean(x)|^2`, what FVU divides by; at least the smallest normal number.

    If ranks share a batch: the variance of all rows times this rank's share of them, so that the mean of the ranks' FVUs,
    weighted by their rows, is the FVU of the batch.
    """
    mean = x.mean(0)
    variance = sum_of_squares(x - mean)
    if ranks.size > 1:
        variance = global_variance(variance, mean, len(x), ranks) * (len(x) / ranks.global_batch_size(len(x)))
    return variance.clamp_min(torch.finfo(x.dtype).tiny)


def fvu_of_rest(
    x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"], ranks: Ranks = SINGLE_PROCESS
) -> Tensor:
    """FVU of a residual; 0 if only rounding error is left, or all rows are the same, so that there is nothing to explain."""
    variance = total_variance(x, ranks)
    finfo = torch.finfo(x.dtype)
    varies = (variance > finfo.tiny) & (variance > (4 * finfo.eps) ** 2 * sum_of_squares(x))
    return squared_error(x, x_hat) * varies / torch.where(varies, variance, 1)


def kl_divergence(p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"]) -> Float[Tensor, ""]:
    """Mean over rows of `KL(p || q)` in nats, of log-probabilities; 0 without rows."""
    return (p.exp() * (p - q)).sum() / max(len(p), 1)


def log_probs(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """Log-probabilities, in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def weighted_l1(values: Float[Tensor, " nnz"], decoder_norms: Float[Tensor, " nnz"], batch: int) -> Float[Tensor, ""]:
    """Mean over tokens of `sum_i |z_i| |d_i|` (Anthropic, April 2024 update): invariant under rescaling a feature."""
    return (values.abs() * decoder_norms).sum() / max(batch, 1)


def auxk(
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
    W_enc_dead: Float[Tensor, "n_dead d_in"],
    b_enc_dead: Float[Tensor, " n_dead"],
    W_dec_dead: Float[Tensor, "n_dead d_out"],
    k_aux: int,
    signed: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    norms: Float[Tensor, " n_dead"] | None = None,
) -> Float[Tensor, ""]:
    """AuxK (Gao et al. 2024, Appendix A.2): the `k_aux` strongest dead features model the residual.

    `MSE(e_hat, e) / MSE(mean(e), e)` with `e` the detached residual, `e_hat` decoded without bias from the ReLU of the
    dead pre-activations of `x` (already centred by `b_dec`); with `signed` activations the strongest are those of
    largest magnitude, and there is no ReLU. With `norms` the strongest are those of largest pre-activation times norm. Only
    rows of dead features are touched. Returns 0 if no feature is dead or nothing is left to explain; 1 means no better than
    the mean.
    """
    if W_enc_dead.shape[0] == 0 or residual.shape[0] == 0:
        return residual.new_zeros(())
    x, target, W_enc_dead, b_enc_dead, W_dec_dead = widened(x, residual.detach(), W_enc_dead, b_enc_dead, W_dec_dead)
    pre_acts = torch.addmm(b_enc_dead, x, W_enc_dead.T)  # (batch, n_dead)
    if k_aux < pre_acts.shape[1]:
        scores = pre_acts.abs() if signed else pre_acts
        top = (scores if norms is None else scores * norms).topk(k_aux, dim=1).indices
        pre_acts = torch.zeros_like(pre_acts).scatter(1, top, pre_acts.gather(1, top))
    return fvu_of_rest(target, (pre_acts if signed else pre_acts.relu()) @ W_dec_dead, ranks)


def info_nce(
    feature_acts: SparseActs, view: SparseActs, temperature: float, ranks: Ranks = SINGLE_PROCESS
) -> Float[Tensor, ""]:
    """InfoNCE (van den Oord, Li & Vinyals 2018) of two views of the same items: the mean over rows t of

        -log( exp(s_tt / T) / sum_r exp(s_tr / T) ),   s_tr = cos(feature_acts_t, view_r)

    with r over the rows of all ranks. A row without active features has cosine 0 with every row.
    """
    others = gather_rows(_unit_rows(view).to_dense(), ranks)  # (all rows, d_sae)
    cosines = decode(_unit_rows(feature_acts), others.T.contiguous())
    first = 0 if ranks.size == 1 else ranks.local_rows.start
    return cross_entropy(cosines / temperature, torch.arange(len(cosines), device=cosines.device) + first)


def _unit_rows(feature_acts: SparseActs) -> SparseActs:
    """The same with the values of each row scaled to norm 1."""
    values = feature_acts.values
    ones = values.new_ones(feature_acts.d_sae, 1)
    norms = (
        decode(feature_acts.with_values(values.square()), ones)[:, 0].clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    )
    return feature_acts.with_values(values / norms[feature_acts.rows])
