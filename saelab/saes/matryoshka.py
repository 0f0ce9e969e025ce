"""Matryoshka SAE (Bussmann et al. 2025, arXiv 2503.17547): nested dictionaries. The features come in groups, and each
prefix of groups has to reconstruct the input by itself, so that general features come first and are not absorbed:

    z = BatchTopK(W_enc (x - b_dec) + b_enc),   x_hat_g = b_dec + W_dec[:h_g] z[:h_g],
    L = (|x - b_dec|^2 + sum_g |x - x_hat_g|^2) / (G + 1) + auxk_alpha * AuxK,   all as fractions of variance
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saelab.kernels.decode import decode
from saelab.losses import squared_error, total_variance
from saelab.saes.batch_topk import BatchTopKConfig, BatchTopKSAE
from saelab.saes.step import Batch, Loss, StepInfo


@dataclass(frozen=True)
class MatryoshkaConfig(BatchTopKConfig):
    """A dictionary of `d_sae` features in nested groups, of which on average `k` fire per token."""

    group_fractions: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Fraction of the features in each group; these add up to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.group_sizes
        if abs(sum(self.group_fractions) - 1) > 1e-6 or min(sizes, default=0) < 1:
            raise ValueError(
                f"group_fractions={self.group_fractions} must be positive, add up to 1, and give each group at least "
                f"one of the d_sae={self.d_sae} features; these give groups of {sizes}."
            )

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

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        feature_acts = self.select(x, info)
        x_hat = self.b_dec.expand_as(target)
        errors = [squared_error(target, x_hat)]
        groups = feature_acts.split_features(self.config.group_sizes)
        for group, rows in zip(groups, self.W_dec.split(self.config.group_sizes), strict=True):
            x_hat = x_hat + decode(group, rows)
            errors.append(squared_error(target, x_hat))
        residual = (x_hat - target).detach()
        variance = total_variance(target, info.ranks)
        nested = torch.stack(errors).mean() / variance
        terms = {"fvu": errors[-1] / variance, "nested": nested} | self.aux_term(x, residual, feature_acts, info)
        aux = self.config.auxk_alpha * terms[self.config.aux] if self.config.aux in terms else 0.0
        return Loss(nested + aux, feature_acts, residual, target, terms)
