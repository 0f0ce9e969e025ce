"""Sparse autoencoders: one file a variant, found by name in `VARIANTS`."""

from saelab.saes.base import SAE, Batch, Loss, SAEOutput, StepInfo
from saelab.saes.relu import ReLUConfig, ReLUSAE
from saelab.saes.topk import TopKConfig, TopKSAE

VARIANTS: dict[str, type[SAE]] = {
    "topk": TopKSAE,
    "relu": ReLUSAE,
}

__all__ = [
    "SAE",
    "VARIANTS",
    "Batch",
    "Loss",
    "ReLUConfig",
    "ReLUSAE",
    "SAEOutput",
    "StepInfo",
    "TopKConfig",
    "TopKSAE",
]
