"""The base class of all variants: weights, input normalisation, and the members that a variant may override.

`x_norm = (x - center) * scale`; feature activations are computed from `x_norm`, and `decode` maps back to raw units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.files import tensors_hash
from saelab.kernels.decode import decode
from saelab.kernels.precision import widened
from saelab.kernels.primitives import unit_norm_
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.config import normalization
from saelab.saes.hooks_used import HooksUsed, one_hook
from saelab.saes.inputs import HALF, as_activations, check_dtype
from saelab.saes.provenance import Provenance
from saelab.saes.step import Batch, Loss, SAEOutput, StepInfo

SHORT_RUN = 4_000_000
"""Tokens up to which a run counts as short: rows are then likely to be seen several times."""


class SAE(nn.Module):
    """A sparse autoencoder. `W_enc` and `W_dec` are both `(d_sae, d_in)`: one feature, one row.

    A variant overrides `encode_normalized` and `loss`, and of the other `extension_points` those in which it differs:
    weights (`make_weights` to `fold`), units (`set_normalization` to `denormalize`), or what other modules ask the class.
    """

    # fmt: off
    extension_points: ClassVar[frozenset[str]] = frozenset({
        "encode_normalized", "loss", "decode", "forward", "after_step", "calibrate",
        "make_weights", "decoder", "decoder_norms", "pre_bias", "weight_decay", "start_at", "fold",
        "set_normalization", "normalize", "normalize_target", "normalized", "denormalize",
        "variant", "Config", "selection_rule", "extra_dims", "tied", "unit_norm", "supports_data_parallel",
        "base_lr", "cpu_preset", "short_preset", "expected_l0", "peak_l0", "has_dense_aux", "hooks",
    })
    # fmt: on
    """What a variant may override; the contract suite refuses anything else."""
    extra_dims: ClassVar[tuple[str, ...]] = ()
    """Sizes that come from the data beside `d_in`: attributes, arguments of `__init__` and keys of `sae.json`."""

    variant: ClassVar[str]
    Config: ClassVar[type]
    tied: ClassVar[bool] = False
    """Whether `W_enc` is another name for `W_dec`."""
    unit_norm: bool = True
    """Whether decoder rows are kept at norm 1 (then training projects their gradient)."""
    supports_data_parallel: ClassVar[bool] = True
    """Whether several processes can train it, each on its share of every batch."""
    base_lr: ClassVar[float] = 3e-3
    """Adam's learning rate at d_sae 4096 when `TrainConfig.lr` is None; scaled by sqrt(4096 / d_sae)."""
    cpu_preset: ClassVar[dict[str, Any]] = {}
    """Fields of the config that `saelab.presets.cpu` sets for a run of any length."""
    short_preset: ClassVar[dict[str, Any]] = {}
    """Those that it sets besides for a run of up to `SHORT_RUN` tokens."""
    selection_rule: str
    """Which pre-activations become codes at inference, for `sae.json`."""

    def __init__(self, config: Any, d_in: int, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.d_in, self.d_sae = d_in, int(config.d_sae)
        rows = torch.randn(self.d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        rows /= rows.norm(dim=1, keepdim=True)
        self.make_weights(rows)
        self.center: Tensor
        self.scale: Tensor
        self.register_buffer("center", torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))
        self.provenance = Provenance()

    def make_weights(self, rows: Float[Tensor, "d_sae d_in"]) -> None:
        """The parameters, from random unit `rows`."""
        self.W_enc, self.W_dec = nn.Parameter(rows.clone()), nn.Parameter(rows)  # (d_sae, d_in)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(self.d_sae)), nn.Parameter(torch.zeros(self.d_in))

    @classmethod
    def preset(cls, n_tokens: int) -> dict[str, Any]:
        """Fields of the config that suit a first run of so many tokens."""
        return cls.cpu_preset | (cls.short_preset if n_tokens <= SHORT_RUN else {})

    @classmethod
    def expected_l0(cls, config: Any) -> float | None:
        """Active features per token that `config` promises; None where it promises none."""
        return None

    @classmethod
    def peak_l0(cls, config: Any) -> float:
        """Active features per token in the densest steps of a run, for the memory plan."""
        l0 = cls.expected_l0(config)
        return config.d_sae / 2 if l0 is None else l0

    @classmethod
    def has_dense_aux(cls, config: Any) -> bool:
        """Whether the loss computes the pre-activations of dead features for every token (AuxK)."""
        return False

    @classmethod
    def hooks(cls, config: Any, names: Sequence[str], hook_name: str | None = None) -> HooksUsed:
        """The hooks of an SAE of this config, among `names` that the data holds; `hook_name` is the one to read.

        Raises `ValueError` naming what is missing.
        """
        return one_hook(names, hook_name)

    def _apply(self, fn: Any, recurse: bool = True) -> SAE:
        """Moves and casts, as of any module; but half precision is for weights. Buffers (centre, scale, thresholds, averages)
        are small and decide what fires, so they stay wide."""
        check_dtype(fn(self.center[:0]).dtype)
        buffers = [(one, name, b) for one in self.modules() for name, b in one._buffers.items() if b is not None]
        super()._apply(fn, recurse)
        for module, name, before in buffers:
            after = module._buffers[name]
            if after is not None and after.dtype in HALF:
                module._buffers[name] = before.to(after.device)
        return self

    @property
    def shape(self) -> dict[str, int]:
        """The sizes of `extra_dims`."""
        return {name: getattr(self, name) for name in self.extra_dims}

    def set_normalization(self, mean: Float[Tensor, "*sources d_in"], mean_square: float | Tensor) -> None:
        """Fix the input normalisation from the data's mean and mean squared norm, as `config.normalize` says.

        "center_and_scale": subtract the mean, scale to root-mean-square norm sqrt(d_in); "scale": scale only.
        """
        center, scale = normalization(self.config.normalize, mean, mean_square)
        self.center.copy_(center)
        self.scale.copy_(scale)

    def normalize(self, x: Any) -> Float[Tensor, "batch d_in"]:
        """Raw activations, on any device and of any float dtype, to the units the weights live in.

        Raises `ValueError` for another width and for what holds no activations.
        """
        x = as_activations(x)
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(
                f"This SAE reads activations of width d_in={self.d_in}, got a tensor of shape {tuple(x.shape)}; "
                "give (n_tokens, d_in) from the hook it was trained on."
            )
        return (x.to(self.center) - self.center).mul_(self.scale)

    @torch.no_grad()
    def start_from(
        self,
        mean: Float[Tensor, "*sources d_in"],
        mean_square: float | Tensor,
        mean_out: Float[Tensor, " d_out"] | None = None,
        mean_square_out: float | Tensor | None = None,
    ) -> None:
        """Before the first step, after `set_normalization` of the same arguments: start as if the data were centred.

        Where the normalisation leaves a mean or another spread than 1, biases and thresholds take them in (`start_at`).
        """
        if self.config.normalize == "center_and_scale":
            return
        x = self.normalize(mean[None])[0]
        square = torch.as_tensor(mean_square, dtype=torch.float64) * self.scale.cpu().double().square()
        variance = (square.sum() - x.cpu().double().square().sum()).clamp_min(0)
        self.start_at(
            x, x if mean_out is None else self.normalize_target(mean_out[None])[0], math.sqrt(variance / len(x))
        )

    def start_at(self, x: Float[Tensor, " width"], y: Float[Tensor, " width_out"], spread: float) -> None:
        """Take in the means of input and target, and the spread that pre-activations have before training."""
        self.b_dec.copy_(y.view_as(self.b_dec))
        if self.pre_bias is None:
            self.b_enc.sub_(self.W_enc @ x)

    @property
    def pre_bias(self) -> Float[Tensor, " d_in"] | None:
        """What is taken from the input before the encoder; None: nothing."""
        return self.b_dec

    def normalize_target(self, y: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        """Raw activations of what is rebuilt, in the units of the decoder."""
        return self.normalize(y)

    def normalized(self, batch: Batch) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """Input and target of a training batch in the units of the weights."""
        x = self.normalize(batch.x)
        return x, x if batch.y is batch.x else self.normalize_target(batch.y)

    def denormalize(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Back to the units of the activations."""
        return x / self.scale + self.center

    def encode(self, x: Any) -> SparseActs:
        """Codes of raw activations `x (batch, d_in)`, a tensor or NumPy array of floats; float32 where weights are narrower.

        Raises `ValueError` for rows that are NaN or infinite.
        """
        return self.encode_normalized(self.checked(self.normalize(x)))

    def checked(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """`x` unless something in it is not finite, which no threshold keeps: it would pass for a token without features."""
        if not bool(x.detach().sum().isfinite()):  # one pass; a sum may also be too large
            bad = (~x.isfinite().all(1)).nonzero().flatten().tolist()
            if bad:
                hook = self.provenance.origin.get("hook_name")
                raise ValueError(
                    f"{len(bad)} of {len(x)} activations{f' of {hook}' if hook else ''} are NaN, infinite or too large for "
                    f"{x.dtype} (the first is row {bad[0]}): leave them out, or run the model in float32."
                )
        return x

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        """Codes of activations that `normalize` has seen."""
        raise NotImplementedError

    def decode(self, feature_acts: SparseActs) -> Float[Tensor, "batch d_in"]:
        """Reconstruction in raw units, `(batch, d_in)`."""
        return self.denormalize(decode(feature_acts, self.W_dec, self.b_dec))

    def forward(self, x: Any) -> SAEOutput:
        """Encode and decode: `x_hat == decode(encode(x))`, to which a skip transcoder adds `skip(x)`."""
        feature_acts = self.encode(x)
        return SAEOutput(self.decode(feature_acts), feature_acts)

    def calibrate(self, x: Float[Tensor, "n ..."]) -> bool:
        """At the end of training: make as many features fire on raw rows `x` that were kept out of it as the config
        promises on average. Gives whether anything is calibrated; not where the selection is exact or nothing promised."""
        return False

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        """The training loss of one batch."""
        raise NotImplementedError

    @property
    def weight_decay(self) -> dict[nn.Parameter, float]:
        """AdamW's weight decay of the parameters that have one."""
        return {}

    @torch.no_grad()
    def after_step(self) -> None:
        """After each optimiser step: decoder rows back to unit norm, where the variant keeps them there."""
        if self.unit_norm:
            unit_norm_(self.W_dec)

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """Decoder rows to norm 1, what they lose to the encoder: the same reconstruction, from codes in one unit for all
        features. Rows of zeros stay; nothing to do where training keeps rows at norm 1."""
        if not self.unit_norm:
            norms = self.decoder_norms
            self.fold(torch.where(norms > 0, norms, 1))

    def fold(self, norms: Float[Tensor, " d_sae"]) -> None:
        """Multiply all that a code is made of by `norms`, and divide the decoder's rows by them."""
        self.W_enc.mul_(norms[:, None])
        self.b_enc.mul_(norms)
        self.W_dec.div_(norms[:, None])

    def decoder(self, source: int = -1) -> tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, ""]]:
        """Decoder rows, and the scale they live in, of the site that features write (`source` counts a crosscoder's)."""
        return self.W_dec, self.scale

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """The norm of each feature's decoder row."""
        return widened(self.W_dec)[0].norm(dim=1)

    @property
    def hash(self) -> str:
        """SHA-256 over names, shapes and bytes of the weights."""
        return tensors_hash(self.state_dict())
