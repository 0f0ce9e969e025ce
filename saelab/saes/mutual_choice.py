"""Mutual Choice SAE (Ayonrinde 2024, arXiv 2411.02124): of all (token, feature) pairs of a batch, the M = k B with
the largest affinity are kept. With the pre-activation as affinity this is BatchTopK's selection; the difference is the
paper's aux_zipf loss, which also trains features that fire less than a tenth as often as Zipf's law predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saelab.saes.batch_topk import BatchTopKConfig, BatchTopKSAE


@dataclass(frozen=True)
class MutualChoiceConfig(BatchTopKConfig):
    """A dictionary of `d_sae` features of which on average `k` fire per token."""

    aux: Literal["auxk", "aux_zipf"] = "aux_zipf"
    """Features that the aux loss trains: dead ones; with "aux_zipf" also any below a tenth of their density under Zipf's law."""


class MutualChoiceSAE(BatchTopKSAE):
    """Keeps the k B largest pre-activations of the batch."""

    variant = "mutual_choice"
    Config = MutualChoiceConfig
