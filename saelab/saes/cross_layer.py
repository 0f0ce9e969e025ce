"""What a cross-layer transcoder is besides its selection and loss: features in layers, of which each reads the input of its own
layer and writes to the outputs of that layer and all later ones. With L layers, and features numbered from the first layer on:

    u^l = W_enc^l x^l + b_enc^l,   y_hat^t = sum_{l <= t} W_dec^{l -> t} z^l + b_dec^t

`W_enc (d_sae, d_in)` holds the layers' rows one after the other, `W_dec (n_rows, d_out)` the decoders of the targets one after
the other: that of target t has a row for each feature of the layers 0 to t, which are the first (t + 1) d_sae / L. So what no
feature can write is not stored: there are d_sae (L + 1) / 2 rows. Every input and every output has its own normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from saelab.kernels.decode import check_feature_acts, decode, decode_error
from saelab.kernels.precision import widened
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.base import SAE
from saelab.saes.config import normalization
from saelab.saes.hooks_used import HooksUsed, chosen_hooks
from saelab.saes.sources import as_row, as_sources, by_source
from saelab.saes.step import Batch


class Layer(NamedTuple):
    """What the features of one layer read."""

    x: Float[Tensor, "batch d_in"]
    W_enc: Float[Tensor, "per_layer d_in"]
    b_enc: Float[Tensor, " per_layer"]


class CrossLayer(SAE):
    """Mixed into an SAE class that has the selection and the loss; `x` is `(batch, n_sources, d_in)`, or `(batch, d_in)` with one
    layer, and so is `y`. `W_dec` starts at 0, as a transcoder's."""

    extra_dims = ("n_sources", "d_out")
    unit_norm = False
    trains_in_model = False  # it predicts several hooks

    def __init__(self, config: Any, d_in: int, seed: int = 0, n_sources: int = 1, d_out: int | None = None) -> None:
        if config.d_sae % n_sources:
            raise ValueError(
                f"d_sae={config.d_sae} counts the features of all layers together, so it must be a multiple of their number, "
                f"{n_sources}."
            )
        super().__init__(config, d_in, seed)
        self.n_sources, self.d_out = n_sources, d_in if d_out is None else d_out
        self.per_layer = self.d_sae // n_sources
        self.W_dec = nn.Parameter(torch.zeros(sum(self._sizes), self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(n_sources, self.d_out))
        self.center, self.scale = torch.zeros(n_sources, d_in), torch.ones(n_sources)
        self.center_out: Tensor
        self.scale_out: Tensor
        self.register_buffer("center_out", torch.zeros(n_sources, self.d_out))
        self.register_buffer("scale_out", torch.ones(n_sources))

    @classmethod
    def hooks(cls, config: Any, names: Sequence[str], hook_name: str | None = None) -> HooksUsed:
        outputs = chosen_hooks("hook_names_out", config.hook_names_out or (), names)
        given = config.hook_names or tuple(name for name in names if name not in outputs)
        inputs = chosen_hooks("hook_names", given, names)
        if outputs and len(inputs) != len(outputs):
            raise ValueError(
                f"hook_names={inputs} and hook_names_out={outputs} must be as many: the input and the output of each layer."
            )
        return HooksUsed(inputs, outputs or inputs)

    def layer_of(self, feature: Any) -> Any:
        """The layer, from 0, that a feature (or each of a tensor of them) reads: the first that it writes to."""
        return feature // self.per_layer

    @property
    def _sizes(self) -> list[int]:
        """How many features write to each target: those of its own and all earlier layers."""
        return [(target + 1) * self.per_layer for target in range(self.n_sources)]

    @property
    def decoders(self) -> tuple[Float[Tensor, "_ d_out"], ...]:
        """For each target the decoder rows of the first features, all that write to it."""
        return self.W_dec.split(self._sizes)

    @property
    def pre_bias(self) -> None:
        return None

    def layers(self, x: Float[Tensor, "batch width"]) -> list[Layer]:
        """The layers' inputs and encoders, in the order of their features."""
        rows = (part.contiguous() for part in x.split(self.d_in, 1))
        encoders = zip(self.W_enc.split(self.per_layer), self.b_enc.split(self.per_layer), strict=True)
        return [Layer(row, *encoder) for row, encoder in zip(rows, encoders, strict=True)]

    def by_target(self, feature_acts: SparseActs) -> list[SparseActs]:
        """For each target the feature activations that reach it."""
        *first, _ = self._sizes
        return [*(feature_acts.split_features([size])[0] for size in first), feature_acts]

    def decode(self, feature_acts: SparseActs, x: Any = None) -> Float[Tensor, "batch *sources d_out"]:
        check_feature_acts(feature_acts, self.d_sae)
        each = zip(self.by_target(feature_acts), self.decoders, self.b_dec, strict=True)
        return self.denormalize(torch.cat([decode(*one) for one in each], 1))

    def rebuild(
        self, feature_acts: SparseActs, target: Float[Tensor, "batch width_out"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch width_out"]]:
        """Squared error summed over the batch and all targets, and reconstruction minus target, detached."""
        rows = (part.contiguous() for part in target.split(self.d_out, 1))
        each = zip(self.by_target(feature_acts), self.decoders, self.b_dec, rows, strict=True)
        errors, residuals = zip(*(decode_error(*one) for one in each), strict=True)
        return torch.stack(errors).sum(), torch.cat(residuals, 1)

    def decoder(self, source: int = -1) -> tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, ""]]:
        """As for any SAE, at one target: 0 for features of later layers."""
        rows = self.decoders[source]
        return pad(rows, (0, 0, 0, self.d_sae - len(rows))), self.scale_out[source]

    @property
    def target_norms(self) -> Float[Tensor, "n_sources d_sae"]:
        """The norm of each feature's decoder row at each target."""
        each = (rows.norm(dim=1) for rows in widened(self.W_dec)[0].split(self._sizes))
        return torch.stack([pad(norms, (0, self.d_sae - len(norms))) for norms in each])

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """The norm of each feature's decoder rows, concatenated over its targets."""
        return self.target_norms.norm(dim=0)

    def fold(self, norms: Float[Tensor, " d_sae"]) -> None:
        self.W_enc.mul_(norms[:, None])
        self.b_enc.mul_(norms)
        for rows in self.decoders:
            rows.div_(norms[: len(rows), None])

    def dense_rows(self, features: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n width"], Float[Tensor, "n width_out"]]:
        """Encoder and decoder rows of some features, of all layers and targets, with the zeros that are not stored."""
        targets = torch.arange(self.n_sources, device=features.device)
        layer = self.layer_of(features)[:, None]
        first = torch.tensor([0, *self._sizes[:-1]], device=features.device).cumsum(0)
        W_enc = self._placed(self.W_enc, targets == layer, features[:, None].expand(-1, self.n_sources))
        return W_enc, self._placed(self.W_dec, targets >= layer, first + features[:, None])

    def _placed(self, W: Tensor, here: Bool[Tensor, "n n_sources"], ids: Int[Tensor, "n n_sources"]) -> Tensor:
        full = W.new_zeros(*here.shape, W.shape[1])
        return as_row(full.index_put(here.nonzero(as_tuple=True), W[ids[here]]))

    def set_normalization(
        self,
        mean: Float[Tensor, "*sources d_in"],
        mean_square: float | Tensor,
        mean_out: Float[Tensor, "*sources d_out"] | None = None,
        mean_square_out: float | Tensor | None = None,
    ) -> None:
        """As for any SAE, for each input and each output by itself; statistics of the outputs default to those of the inputs."""
        for name, one, squares in (("", mean, mean_square), ("_out", mean_out, mean_square_out)):
            one, squares = (mean, mean_square) if one is None or squares is None else (one, squares)
            squares = torch.as_tensor(squares, dtype=torch.float64).reshape(self.n_sources)
            center, scale = normalization(self.config.normalize, one.reshape(self.n_sources, -1), squares)
            getattr(self, f"center{name}").copy_(center)
            getattr(self, f"scale{name}").copy_(scale)

    def start_at(self, x: Float[Tensor, " width"], y: Float[Tensor, " width_out"], spread: float) -> None:
        self.b_dec.copy_(y.view_as(self.b_dec))
        self.b_enc.sub_(torch.cat([layer.W_enc @ layer.x[0] for layer in self.layers(x[None])]))

    def normalize(self, x: Any) -> Float[Tensor, "batch width"]:
        """Map raw activations (any device) to the units of the weights, a token's layers one after the other."""
        what = f"This cross-layer transcoder reads n_sources={self.n_sources} of width d_in={self.d_in}"
        sources = by_source(x, self.n_sources, self.d_in, what).to(self.center)
        return as_row((sources - self.center) * self.scale[:, None])

    def normalize_target(self, y: Float[Tensor, "batch *sources d_out"]) -> Float[Tensor, "batch width_out"]:
        what = f"This cross-layer transcoder predicts n_sources={self.n_sources} of width d_out={self.d_out}"
        targets = by_source(y, self.n_sources, self.d_out, what).to(self.center_out)
        return as_row((targets - self.center_out) * self.scale_out[:, None])

    def normalized(self, batch: Batch) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch width_out"]]:
        return self.normalize(batch.x), self.normalize_target(batch.y)

    def denormalize(
        self, x_norm: Float[Tensor, "batch width_out"], x: Any = None
    ) -> Float[Tensor, "batch *sources d_out"]:
        """Map back to the units of y."""
        raw = as_sources(x_norm, self.n_sources) / self.scale_out[:, None] + self.center_out
        return raw.squeeze(1) if self.n_sources == 1 else raw
