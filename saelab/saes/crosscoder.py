"""Crosscoder (Lindsey et al. 2024, "Sparse crosscoders"; BatchTopK: Minder et al. 2025, arXiv 2504.02922): one set of
feature activations for several sources s, which are layers of a model, or several models run on the same tokens:

    u = sum_s W_enc^s x^s + b_enc,   x_hat^s = W_dec^s z + b_dec^s,   n_i = sum_s |d_i^s|

    "batch_topk": z = u where u n is among the k B largest of the batch, L = FVU over all sources + auxk_alpha * AuxK;
                  at inference z = u where u n > threshold
    "l1":         z = ReLU(u),  L = mean_t(sum_s |x^s - x_hat^s|^2 + lambda sum_i z_i n_i)

n_i is a sum of norms, not the norm of the concatenation: only then does leaving a source out lower the penalty. Each source
has its own normalisation, otherwise one would dominate n. No pre-bias, no norm constraint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from saelab.kernels.decode import decode, decode_error
from saelab.kernels.encode_batch_topk import encode_batch_topk
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.precision import widened
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import weighted_l1
from saelab.saes.config import LATER
from saelab.saes.hooks_used import HooksUsed, chosen_hooks, set_hook_names
from saelab.saes.l0_controller import L0Controller, check_sparsity, start_l0
from saelab.saes.selection import SelectionConfig
from saelab.saes.sources import as_row, as_sources, by_source
from saelab.saes.step import Batch, Loss, StepInfo
from saelab.saes.threshold import ThresholdSAE, smallest
from saelab.saes.token_norm import TOKEN_NORMS
from saelab.validation import check_positive

INIT_NORMS = {"batch_topk": 1.0, "l1": 0.08}  # of a decoder row in each source; Kissane et al.'s code for L1


@dataclass(frozen=True)
class CrosscoderConfig(SelectionConfig):
    """A dictionary of `d_sae` features, each with a direction in every source."""

    sparsity: Literal["batch_topk", "l1"] = "batch_topk"
    """`k` features per token on average, with AuxK; or an L1 penalty, without AuxK, where `k` is ignored."""
    l1_coefficient: float = 5.0
    """lambda, for sources of root-mean-square norm sqrt(d_in) and squared error summed over dimensions and sources."""
    l1_warmup: float = 0.05
    """Fraction of the run over which lambda rises from 0."""
    target_l0: float | None = None
    """Adapt lambda during the run, from `l1_coefficient`, so that this many features fire per token; None keeps it fixed."""
    aux_rank: Literal["norm", "value"] = field(default="norm", metadata=LATER)
    """How AuxK ranks dead features: by u times the sum of decoder norms, as the selection and the authors do, or by u alone."""
    init_norm: float | None = None
    """Initial norm of a row in each source; None means 1 for "batch_topk" and 0.08 for "l1"."""
    hook_names: tuple[str, ...] | None = None
    """The sources, in order; None means every hook of the cache."""

    def __post_init__(self) -> None:
        set_hook_names(self, "hook_names")
        super().__post_init__()
        check_sparsity(self, "l1")
        if self.normalize in TOKEN_NORMS:
            raise ValueError(f"normalize={self.normalize!r} is not supported by crosscoders: use 'center_and_scale'.")
        check_positive(self, "init_norm", fix=", or None")


class CrosscoderSAE(ThresholdSAE):
    """`W_enc` and `W_dec` are `(n_sources, d_sae, d_in)`, laid out in memory feature by feature; `x` is
    `(batch, n_sources, d_in)`, or `(batch, d_in)` with one source. `threshold` applies to `u n`."""

    variant = "crosscoder"
    Config = CrosscoderConfig
    config: CrosscoderConfig
    extra_dims = ("n_sources",)
    unit_norm = False
    base_lr = 1e-3
    selection_rule = "u sum_s |d_s| > threshold; with sparsity l1: u > 0"

    def __init__(self, config: CrosscoderConfig, d_in: int, seed: int = 0, n_sources: int = 1) -> None:
        super().__init__(config, d_in, seed)
        self.n_sources = n_sources
        rows = torch.randn(self.d_sae, n_sources, d_in, generator=torch.Generator().manual_seed(seed))
        rows /= rows.norm(dim=2, keepdim=True)
        rows *= INIT_NORMS[config.sparsity] if config.init_norm is None else config.init_norm
        self.W_enc, self.W_dec = (nn.Parameter(rows.clone().transpose(0, 1)) for _ in range(2))
        self.b_dec = nn.Parameter(torch.zeros(n_sources, d_in))
        self.center, self.scale = torch.zeros(n_sources, d_in), torch.ones(n_sources)
        self.penalty = L0Controller(config.l1_coefficient, config.l1_warmup, config.target_l0)
        if config.sparsity == "l1":
            self.threshold.zero_()
            self.n_observed.fill_(1)

    @classmethod
    def expected_l0(cls, config: CrosscoderConfig) -> float | None:
        return config.target_l0 if config.sparsity == "l1" else config.k

    @classmethod
    def peak_l0(cls, config: CrosscoderConfig) -> float:
        return start_l0(config.d_sae, config.target_l0) if config.sparsity == "l1" else config.k

    @classmethod
    def has_dense_aux(cls, config: CrosscoderConfig) -> bool:
        return config.sparsity == "batch_topk" and super().has_dense_aux(config)

    @classmethod
    def hooks(cls, config: CrosscoderConfig, names: Sequence[str], hook_name: str | None = None) -> HooksUsed:
        several = chosen_hooks("hook_names", config.hook_names or names, names)
        return HooksUsed(several, several)

    @property
    def pre_bias(self) -> None:
        return None

    @property
    def rows(self) -> tuple[Float[Tensor, "d_sae width"], Float[Tensor, "d_sae width"], Float[Tensor, " width"]]:
        """Views in which a row is a feature's directions in all sources, concatenated."""
        W_enc, W_dec = (rearrange(W, "source feature d -> feature (source d)") for W in (self.W_enc, self.W_dec))
        return W_enc, W_dec, rearrange(self.b_dec, "source d -> (source d)")

    def start_at(self, x: Float[Tensor, " width"], y: Float[Tensor, " width"], spread: float) -> None:
        self.penalty.rescale(spread)
        self.b_dec.copy_(y.view_as(self.b_dec))
        self.b_enc.sub_(self.rows[0] @ x)

    def aux_norms(self, info: StepInfo) -> Float[Tensor, " d_sae"] | None:
        by_norm = self.config.aux_rank == "norm" and info.rules >= 2
        return self.decoder_norms.detach() if by_norm else None

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """`n_i = sum_s |d_i^s|`."""
        return widened(self.W_dec)[0].norm(dim=2).sum(0)

    def set_normalization(self, mean: Float[Tensor, "*sources d_in"], mean_square: float | Tensor) -> None:
        """As for any SAE, separately for each source: `mean (n_sources, d_in)`, `mean_square (n_sources)`."""
        squares = torch.as_tensor(mean_square, dtype=torch.float64).reshape(self.n_sources)
        super().set_normalization(mean.reshape(self.n_sources, self.d_in), squares)

    def normalize(self, x: Any) -> Float[Tensor, "batch width"]:
        """Map raw activations (any device) to the units of the weights, a token's sources concatenated in one row."""
        what = f"This crosscoder reads n_sources={self.n_sources} of width d_in={self.d_in}"
        sources = by_source(x, self.n_sources, self.d_in, what)
        return as_row((sources.to(self.center) - self.center) * self.scale[:, None])

    def denormalize(self, x_norm: Float[Tensor, "batch width"], x: Any = None) -> Float[Tensor, "batch *sources d_in"]:
        raw = as_sources(x_norm, self.n_sources) / self.scale[:, None] + self.center
        return raw.squeeze(1) if self.n_sources == 1 else raw

    def encode_above(self, x: Float[Tensor, "batch width"], threshold: Tensor) -> SparseActs:
        norms = self.decoder_norms.detach().clamp_min(torch.finfo(x.dtype).tiny)
        return encode_threshold(x, self.rows[0], self.b_enc, threshold / norms)

    def scores(self, feature_acts: SparseActs) -> Float[Tensor, " nnz"]:
        return feature_acts.values.detach() * self.decoder_norms.detach()[feature_acts.features]

    def calibrate(self, x: Float[Tensor, "n ..."]) -> bool:
        return self.config.sparsity == "batch_topk" and super().calibrate(x)

    def decode(self, feature_acts: SparseActs, x: Any = None) -> Float[Tensor, "batch *sources d_in"]:
        return self.denormalize(decode(feature_acts, *self.rows[1:]))

    def select(self, x: Float[Tensor, "batch width"], info: StepInfo) -> SparseActs:
        norms = self.decoder_norms.detach()
        n_kept, scored = self.config.k * info.ranks.global_batch_size(len(x)), ("decoder_norm", norms)
        feature_acts = encode_batch_topk(
            x, self.rows[0], self.b_enc, n_kept, *scored, global_pairs=self.global_pairs(info)
        )
        self.observe(smallest(feature_acts.values * norms[feature_acts.features]), info)
        return feature_acts

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        return super().loss(batch, info) if self.config.sparsity == "batch_topk" else self._l1_loss(batch, info)

    def _l1_loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        feature_acts = self.encode_normalized(x)
        error, residual = decode_error(feature_acts, *self.rows[1:], target)
        reconstruction = error / max(len(target), 1)
        penalty = weighted_l1(feature_acts.values, self.decoder_norms[feature_acts.features], feature_acts.batch)
        total = reconstruction + self.penalty(feature_acts, info) * penalty
        return Loss(total, feature_acts, residual, target, {"sse": reconstruction, "l1": penalty})

    def decoder(self, source: int = -1) -> tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, ""]]:
        return self.W_dec[source], self.scale[source]
