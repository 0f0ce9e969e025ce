"""Sparse autoencoders: one file per variant, looked up by name in `VARIANTS`."""

from saelab.saes.abs_topk import AbsTopKConfig, AbsTopKSAE
from saelab.saes.base import SAE
from saelab.saes.batch_topk import BatchTopKConfig, BatchTopKSAE
from saelab.saes.batch_topk_transcoder import BatchTopKTranscoderConfig, BatchTopKTranscoderSAE
from saelab.saes.codebook import CodebookConfig, CodebookSAE
from saelab.saes.cross_layer_transcoder import CrossLayerTranscoderConfig, CrossLayerTranscoderSAE
from saelab.saes.crosscoder import CrosscoderConfig, CrosscoderSAE
from saelab.saes.csr import CSRSAE, CSRConfig
from saelab.saes.feature_choice import FeatureChoiceConfig, FeatureChoiceSAE
from saelab.saes.gated import GatedConfig, GatedSAE
from saelab.saes.gba import GBASAE, GBAConfig
from saelab.saes.gradient import GradientConfig, GradientSAE
from saelab.saes.icfl import ICFLSAE, ICFLConfig
from saelab.saes.itda import ITDASAE, ITDAConfig
from saelab.saes.jumprelu import JumpReLUConfig, JumpReLUSAE
from saelab.saes.jumprelu_transcoder import JumpReLUTranscoderConfig, JumpReLUTranscoderSAE
from saelab.saes.masked_topk import MaskedTopKConfig, MaskedTopKSAE
from saelab.saes.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from saelab.saes.matryoshka import MatryoshkaConfig, MatryoshkaSAE
from saelab.saes.mutual_choice import MutualChoiceConfig, MutualChoiceSAE
from saelab.saes.poly import PolyConfig, PolySAE
from saelab.saes.relu import ReLUConfig, ReLUSAE
from saelab.saes.relu_transcoder import ReLUTranscoderConfig, ReLUTranscoderSAE
from saelab.saes.skip_transcoder import SkipTranscoderConfig, SkipTranscoderSAE
from saelab.saes.step import Batch, Loss, SAEOutput, StepInfo
from saelab.saes.top_afa import TopAFAConfig, TopAFASAE
from saelab.saes.topk import TopKConfig, TopKSAE
from saelab.saes.transcoder import TranscoderConfig, TranscoderSAE

VARIANTS: dict[str, type[SAE]] = {
    "topk": TopKSAE,
    "batch_topk": BatchTopKSAE,
    "abs_topk": AbsTopKSAE,
    "masked_topk": MaskedTopKSAE,
    "csr": CSRSAE,
    "gradient": GradientSAE,
    "top_afa": TopAFASAE,
    "poly": PolySAE,
    "relu": ReLUSAE,
    "jumprelu": JumpReLUSAE,
    "gated": GatedSAE,
    "gba": GBASAE,
    "mutual_choice": MutualChoiceSAE,
    "feature_choice": FeatureChoiceSAE,
    "matryoshka": MatryoshkaSAE,
    "matching_pursuit": MatchingPursuitSAE,
    "icfl": ICFLSAE,
    "itda": ITDASAE,
    "codebook": CodebookSAE,
    "crosscoder": CrosscoderSAE,
    "cross_layer_transcoder": CrossLayerTranscoderSAE,
    "transcoder": TranscoderSAE,
    "skip_transcoder": SkipTranscoderSAE,
    "batch_topk_transcoder": BatchTopKTranscoderSAE,
    "relu_transcoder": ReLUTranscoderSAE,
    "jumprelu_transcoder": JumpReLUTranscoderSAE,
}

__all__ = [
    "GBASAE",
    "ITDASAE",
    "SAE",
    "VARIANTS",
    "AbsTopKConfig",
    "AbsTopKSAE",
    "Batch",
    "CSRConfig",
    "CSRSAE",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "BatchTopKTranscoderConfig",
    "BatchTopKTranscoderSAE",
    "CodebookConfig",
    "CodebookSAE",
    "CrossLayerTranscoderConfig",
    "CrossLayerTranscoderSAE",
    "CrosscoderConfig",
    "CrosscoderSAE",
    "FeatureChoiceConfig",
    "FeatureChoiceSAE",
    "GBAConfig",
    "GatedConfig",
    "GatedSAE",
    "ICFLConfig",
    "ICFLSAE",
    "ITDAConfig",
    "GradientConfig",
    "GradientSAE",
    "JumpReLUConfig",
    "JumpReLUSAE",
    "JumpReLUTranscoderConfig",
    "JumpReLUTranscoderSAE",
    "Loss",
    "MaskedTopKConfig",
    "MaskedTopKSAE",
    "MatchingPursuitConfig",
    "MatchingPursuitSAE",
    "MatryoshkaConfig",
    "MatryoshkaSAE",
    "MutualChoiceConfig",
    "MutualChoiceSAE",
    "PolyConfig",
    "PolySAE",
    "ReLUConfig",
    "ReLUSAE",
    "ReLUTranscoderConfig",
    "ReLUTranscoderSAE",
    "SAEOutput",
    "SkipTranscoderConfig",
    "SkipTranscoderSAE",
    "StepInfo",
    "TopAFAConfig",
    "TopAFASAE",
    "TopKConfig",
    "TopKSAE",
    "TranscoderConfig",
    "TranscoderSAE",
]
