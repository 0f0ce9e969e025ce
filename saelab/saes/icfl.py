"""ICFL, iterative codebook feature learning (Donhauser et al. 2025, "Towards scientific discovery with dictionary learning:
extracting biological concepts from microscopy foundation models", arXiv 2412.16247): a dictionary without an encoder, whose
features are found by batched orthogonal matching pursuit. With r_1 = x - b_dec, in rounds t = 1, 2, ... of `per_round` features:

    S_t = the `per_round` largest <r_t, d_i>,   a_t = argmin_a |r_t - sum_{i in S_t} a_i d_i|^2,   r_{t+1} = r_t - sum a_ti d_i
    z = sum_t a_t,   x_hat = W_dec z + b_dec,   L = FVU, in which z is a constant

so only `W_dec` and `b_dec` learn, from the reconstruction alone. A feature may be chosen again in a later round, and coefficients
may be negative. Every 100 steps, of two features with a cosine above 0.9 the later starts again as a random direction. The paper
whitens its inputs by control data (`normalize="whiten"`). Rows of norm 1, and that no <r_t, d_i> below 0 is chosen, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saelab.kernels.decode import decode, decode_error
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import total_variance
from saelab.saes.base import SAE
from saelab.saes.config import check_config
from saelab.saes.least_squares import least_squares
from saelab.saes.matching_pursuit import sum_of_choices
from saelab.saes.step import Batch, Loss, StepInfo
from saelab.validation import check_at_least

RESTART_EVERY = 100
TOO_SIMILAR = 0.9
_RESTARTS = 9 << 28
"""Added to the step, so that new directions share no random numbers with weights or data."""
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class ICFLConfig:
    """A dictionary of `d_sae` features of which at most `k` fire per token, found `per_round` at a time."""

    d_sae: int
    """Number of features."""
    k: int = 100
    """Features per token at most; the pursuit takes k / per_round rounds, of which the last may be smaller."""
    per_round: int = 5
    """Features that a round chooses; 1 is matching pursuit."""
    normalize: str = "center_and_scale"
    """Input normalisation: "center_and_scale", "scale", "whiten" (the paper's) or "none"; stored with the SAE."""

    def __post_init__(self) -> None:
        check_config(self)
        check_at_least(self, 1, "k", "per_round")


class ICFLSAE(SAE):
    """Chooses a few features at a time, and fits their activations to the residual by least squares."""

    variant = "icfl"
    Config = ICFLConfig
    config: ICFLConfig
    tied = True
    selection_rule = "round by round the per_round largest <r, d_i>, where positive, fitted to r by least squares"

    @classmethod
    def expected_l0(cls, config: ICFLConfig) -> float:
        return config.k

    def make_weights(self, rows: Float[Tensor, "d_sae d_in"]) -> None:
        self.W_dec, self.b_dec = nn.Parameter(rows), nn.Parameter(torch.zeros(self.d_in))

    @property
    def W_enc(self) -> Float[Tensor, "d_sae d_in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The dictionary: an alias of `W_dec`."""
        return self.W_dec

    @torch.no_grad()
    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        residual, no_bias, rounds = x - self.b_dec, self.W_dec.new_zeros(self.d_sae), []
        for first in range(0, self.config.k, self.config.per_round):
            n = min(self.config.per_round, self.config.k - first, self.d_sae)
            chosen = encode_topk(residual, self.W_dec, no_bias, n)
            if not chosen.nnz:
                break
            rounds.append(least_squares(chosen, self.W_dec))
            residual = residual - decode(rounds[-1], self.W_dec)
        found = sum_of_choices(rounds, self.d_sae, residual)
        return found.where(found.values != 0)

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        if info.step and info.step % RESTART_EVERY == 0:
            self._restart_similar(info.step)
        x, target = self.normalized(batch)
        feature_acts = self.encode_normalized(x)
        error, residual = decode_error(feature_acts, self.W_dec, self.b_dec, target)
        fvu = error / total_variance(target, info.ranks)
        return Loss(fvu, feature_acts, residual, target, {"fvu": fvu})

    @torch.no_grad()
    def _restart_similar(self, step: int) -> None:
        """Give the later of two similar features a random direction: the same on every rank, and after an interruption."""
        rows = torch.randn(self.d_sae, self.d_in, generator=torch.Generator().manual_seed(_RESTARTS + step))
        rows = (rows / rows.norm(dim=1, keepdim=True)).to(self.W_dec)
        self.W_dec.copy_(torch.where(like_an_earlier(self.W_dec)[:, None], rows, self.W_dec))


def like_an_earlier(W: Float[Tensor, "d_sae d_in"]) -> Bool[Tensor, " d_sae"]:
    """Which unit rows have a cosine above `TOO_SIMILAR` with a row before them."""
    found = []
    for first in range(0, len(W), _ROWS_AT_ONCE):
        rows = W[first : first + _ROWS_AT_ONCE]
        found.append((rows @ W[: first + len(rows)].T > TOO_SIMILAR).tril(first - 1).any(1))
    return torch.cat(found)
