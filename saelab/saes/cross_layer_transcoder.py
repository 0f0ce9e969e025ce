"""Cross-layer transcoder (Ameisen et al. 2025, "Circuit tracing: revealing computational graphs in language models"): features
that read the input of a layer's MLP and predict the outputs of the MLPs of that and all later layers (`cross_layer.py`):

    y_hat^t = sum_{l <= t} W_dec^{l -> t} z^l + b_dec^t

    "jumprelu":   z = u H(u - theta),  L = mean_n(sum_t |y^t - y_hat^t|^2 + lambda sum_i tanh(c z_i |d_i|)
                  + lambda_P sum_i max(theta_i - u_i, 0) |d_i|), the last term for dead features only (as in `jumprelu.py`)
    "topk":       z = ReLU of the k largest u of the token,          L = FVU over all targets + auxk_alpha * AuxK
    "batch_topk": z = u of the k B largest of a batch of B tokens,   the same L;  at inference z = u where u > threshold

|d_i| is the norm of feature i's decoder rows, concatenated. The layers and the tanh penalty are the paper's; the selections by k,
and AuxK over all targets, are ours. With one layer each of the three is the transcoder of its kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.kernels.encode_batch_topk import encode_batch_topk
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.jump_relu import jump_relu
from saelab.kernels.precision import widened
from saelab.kernels.ragged import keep_largest
from saelab.kernels.sparse_acts import SparseActs, join_features
from saelab.saes.config import TURNS_OFF
from saelab.saes.cross_layer import CrossLayer
from saelab.saes.hooks_used import set_hook_names
from saelab.saes.jumprelu import DEFAULT_L0
from saelab.saes.l0_controller import L0Controller, check_sparsity, quiet_level, start_l0
from saelab.saes.selection import SelectionConfig
from saelab.saes.step import Batch, Loss, StepInfo
from saelab.saes.threshold import ThresholdSAE, smallest
from saelab.saes.token_norm import TOKEN_NORMS
from saelab.validation import check_at_least, check_positive

SELECTION_RULES = {
    "topk": "the k largest u / folded of the token, where positive",
    "batch_topk": "u > threshold",
    "jumprelu": "u > exp(log_threshold)",
}


@dataclass(frozen=True)
class CrossLayerTranscoderConfig(SelectionConfig):
    """A dictionary of `d_sae` features, as many in each layer, that write to their own and all later layers."""

    sparsity: Literal["batch_topk", "topk", "jumprelu"] = "batch_topk"
    """`k` features per token, exactly or on average, with AuxK; or a tanh penalty, without AuxK, where `k` is ignored."""
    k_over: Literal["all_layers", "each_layer"] = "all_layers"
    """`k` features per token of all layers together, wherever they are largest; or k / n_layers of each layer. Of "topk" only the
    second lets early features be known without later layers; "batch_topk" compares each with its threshold once trained."""
    sparsity_coefficient: float = 1.0
    """lambda of "jumprelu", for outputs of root-mean-square norm sqrt(d_out) and squared error summed over all targets."""
    sparsity_warmup: float = 0.05
    """Fraction of the run over which lambda rises from 0."""
    target_l0: float | None = None
    """Adapt lambda during the run, from its given value, so that this many features fire per token; None keeps it fixed."""
    bandwidth: float = 0.1
    """Width of the window around a threshold of "jumprelu" in which pre-activations affect its gradient."""
    tanh_scale: float = 4.0
    """c of "jumprelu"."""
    pre_act_coefficient: float = 3e-6
    """lambda_P of "jumprelu"."""
    hook_names: tuple[str, ...] | None = None
    """The inputs, in the order of the layers; None means every hook of the cache that is no output."""
    hook_names_out: tuple[str, ...] | None = None
    """The outputs to predict, in the same order; None means the inputs."""

    def __post_init__(self) -> None:
        for field in ("hook_names", "hook_names_out"):
            set_hook_names(self, field)
        super().__post_init__()
        check_sparsity(self, "sparsity")
        if self.normalize in TOKEN_NORMS:
            raise ValueError(
                f"normalize={self.normalize!r} is not supported by cross-layer transcoders: use 'center_and_scale'."
            )
        check_positive(self, "bandwidth", "tanh_scale")
        check_at_least(self, 0, "pre_act_coefficient", fix=TURNS_OFF)


class CrossLayerTranscoderSAE(CrossLayer, ThresholdSAE):
    """Features of several layers, selected together."""

    variant = "cross_layer_transcoder"
    Config = CrossLayerTranscoderConfig
    config: CrossLayerTranscoderConfig

    def __init__(
        self,
        config: CrossLayerTranscoderConfig,
        d_in: int,
        seed: int = 0,
        n_sources: int = 1,
        d_out: int | None = None,
    ) -> None:
        super().__init__(config, d_in, seed, n_sources, d_out)
        self.selection_rule = SELECTION_RULES[config.sparsity]
        if config.k_over == "each_layer" and config.k % n_sources:
            raise ValueError(
                f"k={config.k} must be a multiple of the number of layers, {n_sources}, for k_over='each_layer'."
            )
        self.folded: Tensor | None
        self.register_buffer("folded", torch.ones(self.d_sae) if config.sparsity == "topk" else None)
        self.register_buffer(
            "threshold", self.threshold.repeat(self.d_sae) if config.sparsity == "batch_topk" else None
        )
        self.n_observed = self.n_observed.repeat(self.d_sae) + (config.sparsity != "batch_topk")
        if config.sparsity == "jumprelu":
            self._start_jump_relu(seed)

    def _start_jump_relu(self, seed: int) -> None:
        config, self.unit = self.config, 1.0  # of the bandwidth
        self.W_dec.data.normal_(generator=torch.Generator().manual_seed(seed + 1))  # at 0 the penalty would hold it
        norms = self.decoder_norms.detach()
        for rows in self.decoders:
            rows.data.div_(norms[: len(rows), None])
        theta = max(quiet_level(self.d_sae, config.target_l0 or DEFAULT_L0), config.bandwidth)
        self.log_threshold = nn.Parameter(torch.full((self.d_sae,), math.log(theta)))
        self.penalty = L0Controller(config.sparsity_coefficient, config.sparsity_warmup, config.target_l0)

    @classmethod
    def expected_l0(cls, config: CrossLayerTranscoderConfig) -> float | None:
        return config.target_l0 if config.sparsity == "jumprelu" else config.k

    @classmethod
    def peak_l0(cls, config: CrossLayerTranscoderConfig) -> float:
        return start_l0(config.d_sae, config.target_l0 or DEFAULT_L0) if config.sparsity == "jumprelu" else config.k

    @classmethod
    def has_dense_aux(cls, config: CrossLayerTranscoderConfig) -> bool:
        return config.sparsity != "jumprelu" and super().has_dense_aux(config)

    @property
    def theta(self) -> Float[Tensor, " d_sae"]:
        """The thresholds of "jumprelu"."""
        return widened(self.log_threshold)[0].exp()

    def known_threshold(self) -> Tensor:
        return self.theta.detach() if self.config.sparsity == "jumprelu" else super().known_threshold()

    def start_at(self, x: Float[Tensor, " width"], y: Float[Tensor, " width_out"], spread: float) -> None:
        if self.config.sparsity == "jumprelu" and spread:
            self.unit = spread
            self.log_threshold.add_(math.log(spread))
            self.penalty.rescale(spread**2)
        super().start_at(x, y, spread)

    def fold(self, norms: Float[Tensor, " d_sae"]) -> None:
        """Of "topk" the selection still ranks by the unfolded u: `folded` holds the factors that u is divided by to compare."""
        super().fold(norms)
        if self.config.sparsity == "jumprelu":
            self.log_threshold.add_(norms.log())
        else:
            (self.threshold if self.folded is None else self.folded).mul_(norms)

    def encode_normalized(self, x: Float[Tensor, "batch width"]) -> SparseActs:
        if self.folded is None:
            return self.encode_above(x, self.known_threshold())
        k, ranked = self.config.k, (1 / self.folded).split(self.per_layer)
        # The best of all layers are among the best of each.
        in_layer = k // self.n_sources if self.config.k_over == "each_layer" else min(k, self.per_layer)
        pairs = zip(self.layers(x), ranked, strict=True)
        found = join_features([encode_topk(*layer, in_layer, "decoder_norm", by) for layer, by in pairs])
        return _at(found, keep_largest(found.values.detach() / self.folded[found.features], found.offsets, k)[0])

    def encode_above(self, x: Float[Tensor, "batch width"], threshold: Tensor, band: float = 0.0) -> SparseActs:
        pairs = zip(self.layers(x), threshold.split(self.per_layer), strict=True)
        return join_features([encode_threshold(*layer, level, band) for layer, level in pairs])

    def select(self, x: Float[Tensor, "batch width"], info: StepInfo) -> SparseActs:
        if self.config.sparsity == "topk":
            return self.encode_normalized(x)
        pairs, n_kept = self.global_pairs(info), self.config.k * info.ranks.global_batch_size(len(x))
        if self.config.k_over == "each_layer":
            n_layer = n_kept // self.n_sources
            by_layer = [encode_batch_topk(*layer, n_layer, global_pairs=pairs) for layer in self.layers(x)]
            self.observe(
                torch.stack([smallest(one.values) for one in by_layer]).repeat_interleave(self.per_layer), info
            )
            return join_features(by_layer)
        n_layer = min(n_kept, len(x) * self.per_layer)
        found = join_features([encode_batch_topk(*layer, n_layer) for layer in self.layers(x)])
        scores = found.values.detach()
        if pairs is None:
            kept = keep_largest(scores, found.offsets[[0, -1]], n_kept)[0]
        else:
            kept = pairs.keep(scores, found.rows, found.features, n_kept)[0]
        self.observe(smallest(scores[kept]), info)
        return _at(found, kept)

    def aux_term(self, x: Tensor, residual: Tensor, feature_acts: SparseActs, info: StepInfo) -> dict[str, Tensor]:
        helped = self.helped(feature_acts, info)
        return self.aux_of(helped, x, *self.dense_rows(helped), residual, info)

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        return self._tanh_loss(batch, info) if self.config.sparsity == "jumprelu" else super().loss(batch, info)

    def _tanh_loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        theta, bandwidth, norms = self.theta, self.config.bandwidth * self.unit, self.decoder_norms
        feature_acts, _ = jump_relu(self.encode_above(x, theta, bandwidth / 2), theta, bandwidth)
        error, residual = self.rebuild(feature_acts, target)
        n, sizes = max(len(target), 1), feature_acts.values * norms[feature_acts.features]
        terms = {"sse": error / n, "sparsity": (self.config.tanh_scale * sizes).tanh().sum() / n}
        fired = feature_acts.where(feature_acts.values != 0)
        coefficient = self.penalty(fired, info)
        total = terms["sse"] + coefficient * terms["sparsity"]
        dead = info.dead.nonzero().squeeze(1)
        if self.config.pre_act_coefficient and len(dead):
            b_enc, x, W_enc = widened(self.b_enc[dead], x, self.dense_rows(dead)[0])
            terms["pre_act"] = ((theta[dead] - torch.addmm(b_enc, x, W_enc.T)).relu() * norms[dead]).sum() / n
            total = total + self.config.pre_act_coefficient * terms["pre_act"]
        return Loss(total, fired, residual, target, terms | {"coefficient": coefficient})

    def calibrate(self, x: Float[Tensor, "n ..."]) -> bool:
        if self.config.sparsity != "jumprelu":
            return self.config.sparsity == "batch_topk" and super().calibrate(x)
        factor = None if self.config.target_l0 is None else self.factor_for(self.config.target_l0, x)
        if factor is not None:
            self.log_threshold.data.add_(math.log(factor))
        return factor is not None


def _at(feature_acts: SparseActs, positions: Tensor) -> SparseActs:
    """The entries at these positions."""
    kept = torch.zeros(feature_acts.nnz, dtype=torch.bool, device=positions.device)
    kept[positions] = True
    return feature_acts.where(kept)
