"""Transcoder (Dunefsky, Chlenski & Nanda 2024, "Transcoders find interpretable LLM feature circuits"), with the TopK of
`topk.py`: features of one hook predict another, usually an MLP's output from its input:

    z = ReLU(TopK(W_enc x + b_enc)),   y_hat = W_dec z + b_dec,   L = FVU(y, y_hat) + auxk_alpha * AuxK

`W_dec` starts at 0 (`transcoding.py`); AuxK works as elsewhere: a dead feature's decoder row can grow from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.encode_groupmax import encode_groupmax
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.config import LATER
from saelab.saes.selection import SelectionConfig, SelectionSAE
from saelab.saes.topk import GROUPMAX, check_groups
from saelab.saes.transcoding import Transcoding

FOLDED_SELECTION = "the k largest u / folded of the token, where positive"


@dataclass(frozen=True)
class TranscoderConfig(SelectionConfig):
    """A dictionary of `d_sae` features, of which at most `k` fire per token, from one hook to another."""

    hook_name_out: str | None = None
    """Hook to predict; None means the one that is read (a plain SAE without pre-bias)."""
    select: Literal["topk", "groupmax"] = field(default="topk", metadata=LATER)
    """"topk": the k largest of all pre-activations; "groupmax": the largest of each of k groups of d_sae / k features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self.select, self.d_sae, self.k)


class TranscoderSAE(Transcoding, SelectionSAE):
    """Keeps the k largest pre-activations of each token."""

    variant = "transcoder"
    Config = TranscoderConfig
    config: TranscoderConfig
    selection_rule = "the k largest u of the token, where positive"

    def __init__(self, config: TranscoderConfig, d_in: int, seed: int = 0, d_out: int | None = None) -> None:
        super().__init__(config, d_in, seed, d_out)
        self.folded: Tensor | None
        self.register_buffer("folded", None)
        if config.select == "groupmax":
            self.selection_rule = GROUPMAX

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        weights, norms = (self.W_enc, self.b_enc, self.config.k), None if self.folded is None else 1 / self.folded
        if self.config.select == "groupmax":
            return encode_groupmax(x, *weights, norms)
        return encode_topk(x, *weights, "value" if norms is None else "decoder_norm", norms)

    def fold(self, norms: Float[Tensor, " d_sae"]) -> None:
        """Selection still ranks by the unfolded u: `folded` holds the factors that u is divided by to compare."""
        super().fold(norms)
        self._compare_by(norms if self.folded is None else self.folded * norms)

    def _compare_by(self, folded: Float[Tensor, " d_sae"]) -> None:
        self.folded = folded
        self.selection_rule = (
            FOLDED_SELECTION if self.config.select == "topk" else GROUPMAX.replace(" u ", " u / folded ")
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """State dicts that were never folded (all of the first version) have no `folded`."""
        if f"{prefix}folded" in state_dict and self.folded is None:
            self._compare_by(torch.ones_like(self.center_out[:1]).repeat(self.d_sae))
        super()._load_from_state_dict(state_dict, prefix, *args)
