"""Matryoshka SAE (Bussmann et al. 2025, arXiv 2503.17547): nested dictionaries. The features come in groups, and each
prefix of groups has to reconstruct the input by itself, so that general features come first and are not absorbed:

    z = BatchTopK(W_enc (x - b_dec) + b_enc),   x_hat_g = b_dec + W_dec[:h_g] z[:h_g],
    L = (|x - b_dec|^2 + sum_g w_g |x - x_hat_g|^2) / (1 + sum_g w_g) + auxk_alpha * AuxK,   all as fractions of variance

with all w_g 1 in the paper's code. `sampled_prefixes` draws the prefixes anew in each step, from a truncated Pareto distribution
(Nabeshima 2024, "Matryoshka sparse autoencoders", whose SAEs have an L1 penalty): P(length >= l) is proportional to
l^-1/2 - d_sae^-1/2. TopK in place of BatchTopK, the weights and the aux loss per level are options of ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.decode import decode
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import squared_error, total_variance
from saelab.saes.annealing import annealed_k
from saelab.saes.base import SAE
from saelab.saes.batch_topk import BatchTopKConfig, BatchTopKSAE
from saelab.saes.config import LATER
from saelab.saes.step import Batch, Loss, StepInfo
from saelab.saes.topk import as_topk
from saelab.validation import MOST, check_at_least

POWER = 0.5
"""Of the Pareto distribution of sampled prefixes."""
_DRAWS = 1_000_000_007


@dataclass(frozen=True)
class MatryoshkaConfig(BatchTopKConfig):
    """A dictionary of `d_sae` features in nested groups, of which on average `k` fire per token."""

    group_fractions: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Fraction of the features in each group; these add up to 1."""
    select: Literal["batch_topk", "topk"] = field(default="batch_topk", metadata=LATER)
    """"batch_topk": k features per token on average; "topk": the k largest of every token, in training and at inference."""
    group_weights: tuple[float, ...] | None = field(default=None, metadata=LATER)
    """Weight of the error of each prefix, relative to that of `b_dec` alone; None: all 1."""
    sampled_prefixes: int | None = field(default=None, metadata=LATER)
    """Draw this many prefixes anew in each step, besides the whole dictionary, in place of those of the groups."""
    level_aux: bool = field(default=False, metadata=LATER)
    """Dead features model what the prefix that ends with their own group leaves over, not what the whole dictionary does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_levels()
        sizes = self.group_sizes
        if abs(sum(self.group_fractions) - 1) > 1e-6 or min(sizes, default=0) < 1:
            raise ValueError(
                f"group_fractions={self.group_fractions} must be positive, add up to 1, and give each group at least "
                f"one of the d_sae={self.d_sae} features; these give groups of {sizes}."
            )

    def _check_levels(self) -> None:
        weights = self.group_weights
        if weights is not None and (
            not isinstance(weights, tuple | list)
            or len(weights) != len(self.group_fractions)
            or not all(0 <= weight <= MOST for weight in weights)
            or not weights[-1]
        ):
            raise ValueError(
                f"group_weights={weights} must hold a finite number from 0 on for each of the {len(self.group_fractions)} "
                "groups, and more than 0 for the last, with which all features reconstruct."
            )
        check_at_least(self, 1, "sampled_prefixes")
        if self.sampled_prefixes is not None and weights is not None:
            raise ValueError(f"group_weights={weights} belong to fixed groups; leave sampled_prefixes at None.")

    @property
    def prefixes(self) -> list[int]:
        """Number of features in the first 1, 2, ... groups."""
        shares = torch.tensor(self.group_fractions, dtype=torch.float64).cumsum(0)
        return [round(self.d_sae * float(share)) for share in shares]

    @property
    def group_sizes(self) -> list[int]:
        """Number of features in each group."""
        ends = self.prefixes
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK with a reconstruction at every prefix; `feature_acts.below(h)` are the activations of the first h features."""

    variant = "matryoshka"
    Config = MatryoshkaConfig
    config: MatryoshkaConfig

    def __init__(self, config: MatryoshkaConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        if config.select == "topk":
            self.selection_rule = "the k largest u of the token, where positive"
            self.threshold.zero_()
            self.n_observed.fill_(1)

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return self._best(x, self.config.k) if self.config.select == "topk" else super().encode_normalized(x)

    def select(self, x: Float[Tensor, "batch d_in"], info: StepInfo) -> SparseActs:
        by_token = self.config.select == "topk"
        return self._best(x, round(annealed_k(self.config, info))) if by_token else super().select(x, info)

    def as_exported(self) -> SAE:
        return as_topk(self) if self.config.select == "topk" else self

    def calibrate(self, x: Float[Tensor, "n ..."]) -> bool:
        return self.config.select == "batch_topk" and super().calibrate(x)

    def _best(self, x: Tensor, k: int) -> SparseActs:
        return encode_topk(x, self.W_enc, self.b_enc, k, center=self.pre_bias)

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        feature_acts, sizes = self.select(x, info), self.sizes(info.step)
        x_hat = self.b_dec.expand_as(target)
        errors, residuals = [squared_error(target, x_hat)], []
        for group, rows in zip(feature_acts.split_features(sizes), self.W_dec.split(sizes), strict=True):
            x_hat = x_hat + decode(group, rows)
            errors.append(squared_error(target, x_hat))
            residuals.append((x_hat - target).detach())
        variance = total_variance(target, info.ranks)
        nested = self._mean(torch.stack(errors)) / variance
        terms = {"fvu": errors[-1] / variance, "nested": nested} | self._aux(x, residuals, sizes, feature_acts, info)
        aux = self.config.auxk_alpha * terms[self.config.aux] if self.config.aux in terms else 0.0
        return Loss(nested + aux, feature_acts, residuals[-1], target, terms)

    def sizes(self, step: int) -> list[int]:
        """Number of features in each group of a training step."""
        n = self.config.sampled_prefixes
        ends = self.config.prefixes if n is None else sampled_prefixes(self.d_sae, n, step)
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _mean(self, errors: Float[Tensor, " levels"]) -> Float[Tensor, ""]:
        """The mean over the levels, weighted by `group_weights`."""
        if self.config.group_weights is None:
            return errors.mean()
        weights = errors.new_tensor([1.0, *self.config.group_weights])
        return (weights * errors).sum() / weights.sum()

    def _aux(
        self, x: Tensor, residuals: list[Tensor], sizes: list[int], feature_acts: SparseActs, info: StepInfo
    ) -> dict[str, Tensor]:
        """The aux loss of the whole dictionary, or the mean over the groups that have features to help."""
        if not self.config.level_aux:
            return self.aux_term(x, residuals[-1], feature_acts, info)
        helped, group = self.helped(feature_acts, info), torch.arange(len(sizes), device=x.device)
        group = group.repeat_interleave(torch.tensor(sizes, device=x.device))
        of_groups = []
        for g, left in enumerate(residuals):
            mine = helped[group[helped] == g]
            of_groups.append(self.aux_of(mine, x - self.b_dec, self.W_enc[mine], self.W_dec[mine], left, info))
        found = [loss for terms in of_groups for loss in terms.values()]
        return {self.config.aux: torch.stack(found).mean()} if found else {}


def sampled_prefixes(d_sae: int, n: int, step: int) -> list[int]:
    """The ends of `n` prefixes drawn for a step and of the whole dictionary, ascending, each once: the same on every rank, and
    again after an interruption."""
    u = torch.rand(n, generator=torch.Generator().manual_seed(_DRAWS + step), dtype=torch.float64)
    drawn = (1 - u * (1 - d_sae**-POWER)) ** (-1 / POWER)
    return sorted({*drawn.long().clamp(1, d_sae).tolist(), d_sae})
