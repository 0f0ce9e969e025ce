"""Which SAEs have a fused step, where it is, and from which training rules on a GPU takes it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from saelab.saes import SAE
from saelab.saes.abs_topk import AbsTopKConfig, AbsTopKSAE
from saelab.saes.batch_topk import BatchTopKConfig, BatchTopKSAE
from saelab.saes.jumprelu import JumpReLUConfig, JumpReLUSAE
from saelab.saes.relu import ReLUConfig, ReLUSAE
from saelab.saes.topk import TopKConfig, TopKSAE


class Fused(NamedTuple):
    """A fused step."""

    module: str
    """In `saelab.training`; imported when it is needed, as it imports Triton."""
    name: str
    since: int
    """The first training rules under which it is taken: a run begun before keeps the general step."""

    def load(self) -> type[Any]:
        """The class."""
        return getattr(import_module(f"saelab.training.{self.module}"), self.name)


def _topk(config: TopKConfig) -> Fused | None:
    if config.select != "topk" or config.multi_topk or config.aux != "auxk" or config.k_start is not None:
        return None
    by_value = config.score == "value"
    return Fused("fused_step", "FusedStep", 5) if by_value else Fused("fused_scores", "FusedByNorm", 6)


def _abs_topk(config: AbsTopKConfig) -> Fused | None:
    return Fused("fused_scores", "FusedAbsTopK", 6) if config.aux == "auxk" else None


def _batch_topk(config: BatchTopKConfig) -> Fused | None:
    plain = config.aux == "auxk" and config.k_start is None
    return Fused("fused_batch_topk", "FusedBatchTopK", 6) if plain else None


def _relu(config: ReLUConfig) -> Fused | None:
    return Fused("fused_threshold", "FusedThreshold", 6) if config.resample_every is None else None


def _jumprelu(config: JumpReLUConfig) -> Fused:
    return Fused("fused_jumprelu", "FusedJumpReLU", 6)


TABLE: dict[type[SAE], Callable[[Any], Fused | None]] = {
    TopKSAE: _topk,
    AbsTopKSAE: _abs_topk,
    BatchTopKSAE: _batch_topk,
    ReLUSAE: _relu,
    JumpReLUSAE: _jumprelu,
}
"""By class of the SAE; not by its subclasses, which may compute something else."""


def fused_step_of(sae: SAE) -> Fused | None:
    """The fused step that computes the loss of this SAE, if there is one."""
    find = TABLE.get(type(sae))
    return None if find is None else find(sae.config)
