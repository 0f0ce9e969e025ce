"""SAEs whose features are sharded over ranks: each holds d_sae / S rows of `W_enc`, `b_enc` and `W_dec`.

A step communicates twice: the candidates of the selection, `(batch, k)` scores, and the sum of the reconstructions,
`(batch, d_in)`. The selection is that of the whole dictionary, ties included. Gradients of feature rows need no communication
between shards, as each has the full residual. `b_dec` is replicated, and its gradient is summed over the shards.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saelab.distributed.collectives import Ranks
from saelab.distributed.global_topk import GlobalPairs
from saelab.distributed.mesh import Mesh
from saelab.kernels.decode import decode
from saelab.kernels.ragged import kth_largest
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import fvu_of_rest, squared_error
from saelab.saes.annealing import annealed_k
from saelab.saes.base import SAE
from saelab.saes.batch_topk import BatchTopKSAE
from saelab.saes.selection import SelectionSAE
from saelab.saes.step import StepInfo
from saelab.saes.topk import TopKSAE

ROWS = ("W_enc", "b_enc", "W_dec")
"""Parameters with one row per feature."""


class AllReduceSum(Function):
    """Sum over ranks. All compute the same from it, so its gradient is the gradient of every rank's part."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, ranks: Ranks) -> Tensor:
        return ranks.all_reduce_sum(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class FeatureShard(SelectionSAE):
    """The features of one rank; `d_sae` is their number. Only `loss` is meant to be called."""

    mesh: Mesh

    @property
    def first_feature(self) -> int:
        """Index of its first feature in the whole dictionary."""
        return self.mesh.feature.rank * self.d_sae

    def rebuild(self, feature_acts: SparseActs, target: Tensor) -> tuple[Tensor, Tensor]:
        x_hat = self._sum(decode(feature_acts, self.W_dec)) + self._local_b_dec
        return squared_error(target, x_hat), (x_hat - target).detach()

    def aux_term(self, x: Tensor, residual: Tensor, feature_acts: SparseActs, info: StepInfo) -> dict[str, Tensor]:
        chosen = info.dead.nonzero().squeeze(1)
        if not self.config.auxk_alpha or not self.mesh.feature.any_rank(bool(len(chosen)), x.device):
            return {}
        dead_acts = torch.addmm(self.b_enc[chosen], x - self.b_dec, self.W_enc[chosen].T).relu()  # (batch, n_dead)
        k_aux = self.config.k_aux or max(self.d_in // 2, 1)
        best = dead_acts.detach().topk(min(k_aux, len(chosen)), dim=1).indices.sort(dim=1).values
        kept = among_best(dead_acts.detach().gather(1, best), k_aux, self.mesh.feature)
        dead_acts = dead_acts * torch.zeros_like(dead_acts).scatter(1, best, kept.to(dead_acts.dtype))
        return {"auxk": fvu_of_rest(-residual, self._sum(dead_acts @ self.W_dec[chosen]), info.ranks)}

    def _sum(self, local: Tensor) -> Tensor:
        return AllReduceSum.apply(local, self.mesh.feature)  # pyright: ignore[reportReturnType]

    @property
    def _local_b_dec(self) -> Tensor:
        """`b_dec`, with its gradient from the reconstruction on one shard only, so that the sum over shards counts it once."""
        return self.b_dec if self.mesh.feature.is_main_process else self.b_dec.detach()


class TopKShard(FeatureShard, TopKSAE):
    """A token's k largest over all shards are among the k largest of the individual shards."""

    def select(self, x: Float[Tensor, "batch d_in"], info: StepInfo) -> SparseActs:
        k = round(annealed_k(self.config, info))
        feature_acts = self._best(x, k)
        here = torch.arange(k, device=x.device) < feature_acts.counts[:, None]
        scores = x.new_zeros(here.shape).masked_scatter_(here, feature_acts.values.detach())
        return feature_acts.where(among_best(scores, k, self.mesh.feature)[here])


class BatchTopKShard(FeatureShard, BatchTopKSAE):
    """Selects among the pairs of all shards together."""

    def global_pairs(self, info: StepInfo) -> GlobalPairs:
        full, first_row = self.d_sae * self.mesh.feature.size, info.ranks.local_rows.start
        return GlobalPairs(self.mesh.world, full, first_row, self.first_feature)

    def observe(self, smallest: Tensor, info: StepInfo) -> None:
        super().observe(self.mesh.world.all_reduce_min(smallest), info)


SHARDS: dict[str, type[FeatureShard]] = {"topk": TopKShard, "batch_topk": BatchTopKShard}


def among_best(scores: Float[Tensor, "batch m"], k: int, shards: Ranks) -> Bool[Tensor, "batch m"]:
    """Which of this shard's scores (at most k of a row) are among the k largest positive ones of their row on all shards.

    Each row is in feature order; ties go to the lower shard, then the earlier score, and so to the lowest feature.
    One collective of `(batch, k)` numbers.
    """
    m = scores.shape[1]
    full = torch.cat(shards.all_gather_same_shape(F.pad(scores, (0, k - m)).contiguous()), dim=1)  # in feature order
    kth = kth_largest(full, k)[:, None]
    above, tied = full > kth, full == kth
    n_left = k - above.sum(1, keepdim=True)
    kept = (above | (tied & (tied.cumsum(1) <= n_left))) & (full > 0)
    return kept.split(k, dim=1)[shards.rank][:, :m]


_TOPK_OPTIONS = ("multi_topk", "select", "score", "pre_bias")


def check_shardable(variant: type[SAE], config: Any, feature_shards: int) -> None:
    """Raises `ValueError` if this SAE cannot be split into `feature_shards` shards."""
    if variant.variant not in SHARDS:
        raise ValueError(
            f"feature_shards={feature_shards} works for {' and '.join(SHARDS)}; {variant.variant} trains data-parallel: leave "
            "feature_shards at 1."
        )
    k = config.k_start or config.k
    if config.d_sae % feature_shards or config.d_sae // feature_shards < k:
        raise ValueError(
            f"d_sae={config.d_sae} must be a multiple of feature_shards={feature_shards}, each shard with at least "
            f"k={k} features."
        )
    changed = [
        name for name in ("aux", *_TOPK_OPTIONS) if getattr(config, name, None) != getattr(type(config), name, None)
    ]
    if changed:
        raise ValueError(
            f"feature_shards={feature_shards} supports only the defaults of {', '.join(changed)}: change the config."
        )


def shard_of(sae: SAE, mesh: Mesh) -> FeatureShard:
    """This rank's features of a whole SAE."""
    config = dataclasses.replace(sae.config, d_sae=sae.d_sae // mesh.feature.size)
    shard = SHARDS[sae.variant](config, sae.d_in)
    shard.mesh = mesh
    here = slice(shard.first_feature, shard.first_feature + shard.d_sae)
    full = sae.state_dict()
    shard.load_state_dict({name: x[here] if name in ROWS else x for name, x in full.items()})
    shard.provenance = sae.provenance
    return shard


def gather_into(sae: SAE | None, shard: FeatureShard) -> None:
    """Fill a whole SAE from the shards, one after another; ranks that pass None only send theirs."""
    full = {} if sae is None else sae.state_dict()
    for name, local in shard.state_dict().items():
        slices = shard.mesh.feature.each(local) if name in ROWS else [local]
        start = 0
        for rows in slices:
            if full:
                full[name].view(-1)[start : start + rows.numel()].copy_(rows.view(-1))
            start += rows.numel()
