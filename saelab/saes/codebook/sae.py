"""Codebook features (Tamkin et al. 2023, "Codebook Features: Sparse and Discrete Interpretability for Neural Networks") on
cached activations of a frozen model: the input is reconstructed as the mean of the k most similar codes, L = FVU.

    x_hat = 1/k sum_{i in I} c_i,   I = the k codes most similar to x

In the paper codebooks are inside a model that is trained with them: `saelab.saes.codebook.insert`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.decode import check_feature_acts, decode_error
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import total_variance
from saelab.saes.base import SAE
from saelab.saes.codebook.config import CodebookConfig
from saelab.saes.codebook.quantizer import Codebook
from saelab.saes.step import Batch, Loss, StepInfo


class CodebookSAE(SAE):
    """Every code that fires has the value 1/k (1 for sums). No encoder and no bias: codes are compared with the input."""

    variant = "codebook"
    Config = CodebookConfig
    config: CodebookConfig
    tied = True
    unit_norm = False
    supports_data_parallel = False
    selection_rule = "the k most similar codes of each group, whatever their similarity"
    base_lr = 1e-3

    def __init__(self, config: CodebookConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.codebook = Codebook(config, d_in, config.n_groups or 1, bool(config.layer_norm), seed)

    @classmethod
    def expected_l0(cls, config: CodebookConfig) -> float:
        return float(config.k * (config.n_groups or 1))

    def make_weights(self, rows: Float[Tensor, "d_sae d_in"]) -> None:
        """The codes are the only weights."""

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """One code per row; with groups, zero outside the group's slice."""
        codes, groups = self.codebook.codes, self.codebook.n_groups
        if groups == 1:
            return codes
        blocks = codes.unflatten(0, (groups, -1))
        return torch.block_diag(*blocks)

    @property
    def W_enc(self) -> Float[Tensor, "d_sae d_in"]:
        """The same as `W_dec`: codes are compared with the input directly."""
        return self.W_dec

    def start_at(self, x: Float[Tensor, " d_in"], y: Float[Tensor, " d_in"], spread: float) -> None:
        """Nothing to do: codes are initialised from the first batch."""

    def fold(self, norms: Float[Tensor, " d_sae"]) -> None:
        """Nothing to do: the value of every kept code is fixed."""

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return self.codebook.encode(x)

    def decode(self, feature_acts: SparseActs, x: Any = None) -> Float[Tensor, "batch d_in"]:
        check_feature_acts(feature_acts, self.d_sae)
        return self.denormalize(self.codebook.decode(feature_acts), x)

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        book = self.codebook
        book.prepare(target)  # codes are in the units of the target
        feature_acts = self.encode_normalized(x)
        book.observe(target, feature_acts)
        error, residual = decode_error(book.by_slice(feature_acts), book.codes, None, book.grouped(target))
        loss = error / total_variance(target)
        return Loss(loss, feature_acts, residual.view(target.shape), target, {"fvu": loss})

    @torch.no_grad()
    def after_step(self) -> None:
        self.codebook.after_step()
