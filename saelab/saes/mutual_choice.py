"""Mutual Choice SAE (Ayonrinde 2024, arXiv 2411.02124): token and feature choose each other; of all pairs of a batch
the M = k B with the largest affinity are kept. Taking the pre-activation as affinity this is BatchTopK's selection; what
is added is that paper's aux_zipf loss, which helps every feature that fires less than Zipf's law expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saelab.saes.batch_topk import BatchTopKSAE
from saelab.saes.selection import SelectionConfig


@dataclass(frozen=True)
class MutualChoiceConfig(SelectionConfig):
    """A dictionary of `d_sae` features of which `k` fire on an average token."""

    aux: Literal["auxk", "aux_zipf"] = "aux_zipf"
    """Whom the aux loss serves: features that are dead, or also those that fire less than a tenth of what Zipf's law expects."""


class MutualChoiceSAE(BatchTopKSAE):
    """Keeps the k B largest pre-activations of the batch."""

    variant = "mutual_choice"
    Config = MutualChoiceConfig
