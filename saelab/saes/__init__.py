"""Sparse autoencoders: one file a variant, found by name in `VARIANTS`."""

from saelab.saes.abs_topk import AbsTopKConfig, AbsTopKSAE
from saelab.saes.base import SAE, Batch, Loss, SAEOutput, StepInfo
from saelab.saes.batch_topk import BatchTopKConfig, BatchTopKSAE
from saelab.saes.feature_choice import FeatureChoiceConfig, FeatureChoiceSAE
from saelab.saes.gated import GatedConfig, GatedSAE
from saelab.saes.jumprelu import JumpReLUConfig, JumpReLUSAE
from saelab.saes.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from saelab.saes.matryoshka import MatryoshkaConfig, MatryoshkaSAE
from saelab.saes.mutual_choice import MutualChoiceConfig, MutualChoiceSAE
from saelab.saes.relu import ReLUConfig, ReLUSAE
from saelab.saes.topk import TopKConfig, TopKSAE

VARIANTS: dict[str, type[SAE]] = {
    "topk": TopKSAE,
    "batch_topk": BatchTopKSAE,
    "abs_topk": AbsTopKSAE,
    "mutual_choice": MutualChoiceSAE,
    "feature_choice": FeatureChoiceSAE,
    "matryoshka": MatryoshkaSAE,
    "relu": ReLUSAE,
    "jumprelu": JumpReLUSAE,
    "gated": GatedSAE,
    "matching_pursuit": MatchingPursuitSAE,
}

__all__ = [
    "SAE",
    "VARIANTS",
    "AbsTopKConfig",
    "AbsTopKSAE",
    "Batch",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "FeatureChoiceConfig",
    "FeatureChoiceSAE",
    "GatedConfig",
    "GatedSAE",
    "JumpReLUConfig",
    "JumpReLUSAE",
    "Loss",
    "MatchingPursuitConfig",
    "MatchingPursuitSAE",
    "MatryoshkaConfig",
    "MatryoshkaSAE",
    "MutualChoiceConfig",
    "MutualChoiceSAE",
    "ReLUConfig",
    "ReLUSAE",
    "SAEOutput",
    "StepInfo",
    "TopKConfig",
    "TopKSAE",
]
