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
from saelab.saes.config import SHORT_RUN, normalization
from saelab.saes.hooks_used import HooksUsed, one_hook
from saelab.saes.inputs import HALF, as_activations, check_dtype, check_finite, tokens_given
from saelab.saes.provenance import Provenance
from saelab.saes.step import Batch, Loss, SAEOutput, StepInfo
from saelab.saes.token_norm import TOKEN_NORMS, normalize_tokens, normalized_moments, restore_tokens, token_sizes
from saelab.saes.whitening import WHITEN, Whitening


class SAE(nn.Module):
    """A sparse autoencoder. `W_enc` and `W_dec` are both `(d_sae, d_in)`, one row per feature.

    A variant overrides `encode_normalized` and `loss`, plus whichever other `extension_points` it needs.
    """

    # fmt: off
    extension_points: ClassVar[frozenset[str]] = frozenset({
        "encode_normalized", "loss", "decode", "forward", "after_step", "calibrate",
        "make_weights", "decoder", "decoder_norms", "pre_bias", "weight_decay", "start_at", "fold",
        "set_normalization", "normalize", "normalize_target", "normalized", "denormalize", "token_sizes", "sparse_target",
        "variant", "Config", "selection_rule", "extra_dims", "tied", "unit_norm", "supports_data_parallel",
        "takes_view", "additive", "competes", "base_lr", "cpu_preset", "short_preset", "expected_l0", "peak_l0",
        "has_dense_aux", "hooks", "as_exported", "needs_labels", "needs_gradients",
    })
    # fmt: on
    """What a variant may override; the contract suite rejects anything else."""
    extra_dims: ClassVar[tuple[str, ...]] = ()
    """Sizes besides `d_in` that the data determines: attributes, arguments of `__init__` and keys of `sae.json`."""
    variant: ClassVar[str]
    Config: ClassVar[type]
    tied: ClassVar[bool] = False
    """Whether `W_enc` is an alias of `W_dec`."""
    unit_norm: bool = True
    """Whether decoder rows are kept at norm 1 (training then removes the gradient component parallel to each row)."""
    supports_data_parallel: ClassVar[bool] = True
    """Whether it can be trained data-parallel, each rank on its share of every batch."""
    additive: ClassVar[bool] = True
    """Whether `decode` is linear plus a constant; otherwise an edit adds the difference of two decodes (`edits/rows.py`)."""
    competes: ClassVar[bool] = True
    """Without thresholds, whether a feature fires by being among the largest of its token, and not by being positive."""
    takes_view: ClassVar[bool] = False
    """Whether y of a training `Batch(x, y)` is a second view of x, which is not reconstructed."""
    needs_labels: ClassVar[bool] = False
    """Whether training passes `Batch.labels`."""
    needs_gradients: ClassVar[bool] = False
    """Whether it is trained with the gradient of the model's loss at each activation."""
    shows_progress: bool = False
    """Whether a step that takes long shows a bar of its own."""
    base_lr: ClassVar[float] = 3e-3
    """Adam's learning rate at d_sae 4096 when `TrainConfig.lr` is None; scaled by sqrt(4096 / d_sae)."""
    cpu_preset: ClassVar[dict[str, Any]] = {}
    """Config fields that `saelab.presets.cpu` sets for runs of any length."""
    short_preset: ClassVar[dict[str, Any]] = {}
    """Config fields that it sets in addition for runs of up to `SHORT_RUN` tokens."""
    selection_rule: str
    """Which pre-activations are kept at inference, as recorded in `sae.json`."""

    def __init__(self, config: Any, d_in: int, seed: int = 0) -> None:
        super().__init__()
        self.config, self.d_in, self.d_sae = config, d_in, int(config.d_sae)
        rows = torch.randn(self.d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        rows /= rows.norm(dim=1, keepdim=True)
        self.make_weights(rows)
        self.center: Tensor
        self.scale: Tensor
        self.register_buffer("center", torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))
        self.whitening = Whitening(d_in) if config.normalize == WHITEN else None
        self.provenance = Provenance()

    def make_weights(self, rows: Float[Tensor, "d_sae d_in"]) -> None:
        """Create the parameters from `rows`, random vectors of norm 1."""
        self.W_enc, self.W_dec = nn.Parameter(rows.clone()), nn.Parameter(rows)  # (d_sae, d_in)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(self.d_sae)), nn.Parameter(torch.zeros(self.d_in))

    @classmethod
    def preset(cls, n_tokens: int) -> dict[str, Any]:
        """Config fields that suit a first run of `n_tokens` tokens."""
        return cls.cpu_preset | (cls.short_preset if n_tokens <= SHORT_RUN else {})

    @classmethod
    def expected_l0(cls, config: Any) -> float | None:
        """Active features per token that `config` aims for; None if it sets no target."""
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
        """The hooks that an SAE of this config uses, out of `names` (those in the data); `hook_name` is the one to read. Raises
        `ValueError` naming a hook that is missing."""
        return one_hook(names, hook_name)

    def _apply(self, fn: Any, recurse: bool = True) -> SAE:
        """Move or cast as for any module, except that only weights become half precision: buffers (centre, scale,
        thresholds, averages) are small and decide which features fire, so they keep their wider dtype."""
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
        """Set the input normalisation from the data's mean and mean squared norm. "center_and_scale": subtract the mean, scale to
        root-mean-square norm sqrt(d_in); "scale": scale only; "whiten": subtract the mean, until `whitening.fit` has more."""
        if self.whitening is not None:
            self.whitening.fit(mean, torch.eye(self.d_in))
        center, scale = normalization(self.config.normalize, mean, mean_square)
        self.center.copy_(center)
        self.scale.copy_(scale)

    def normalize(self, x: Any) -> Float[Tensor, "batch d_in"]:
        """Raw activations (any device, any float dtype) in the units of the weights. Raises `ValueError` for anything else."""
        x = as_activations(x)
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(
                f"This SAE reads activations of width d_in={self.d_in}, got a tensor of shape {tuple(x.shape)}; "
                "pass (n_tokens, d_in) from the hook it was trained on."
            )
        if self.whitening is not None:
            return self.whitening.normalize(x.to(self.center))
        return (normalize_tokens(self.config.normalize, x.to(self.center)) - self.center).mul_(self.scale)

    @torch.no_grad()
    def start_from(
        self,
        mean: Float[Tensor, "*sources d_in"],
        mean_square: float | Tensor,
        mean_out: Float[Tensor, "*sources d_out"] | None = None,
        mean_square_out: float | Tensor | None = None,
    ) -> None:
        """Initialise biases and thresholds as if the data were centred, with standard deviation 1 (`start_at`).

        Call before the first step, after `set_normalization` with the same arguments; "center_and_scale" needs nothing.
        """
        if self.config.normalize == "center_and_scale":
            return
        if self.config.normalize in TOKEN_NORMS:
            x, square = normalized_moments(self.config.normalize, mean.to(self.center), mean_square)
        else:
            x = self.normalize(mean[None])[0]
            square = torch.as_tensor(mean_square, dtype=torch.float64) * self.scale.cpu().double().square()
        variance = (square.sum() - x.cpu().double().square().sum()).clamp_min(0)
        y = x if mean_out is None else self.normalize_target(mean_out[None])[0]
        self.start_at(x, y, math.sqrt(variance / len(x)))

    def start_at(self, x: Float[Tensor, " width"], y: Float[Tensor, " width_out"], spread: float) -> None:
        """Absorb the means `x` of the input and `y` of the target, and the initial standard deviation of pre-activations."""
        self.b_dec.copy_(y.view_as(self.b_dec))
        if self.pre_bias is None:
            self.b_enc.sub_(self.W_enc @ x)

    @property
    def pre_bias(self) -> Float[Tensor, " d_in"] | None:
        """The bias subtracted from the input before the encoder, or None."""
        return self.b_dec

    def normalize_target(self, y: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        """Map raw activations of the target to the units of the decoder."""
        return self.normalize(y)

    def normalized(self, batch: Batch) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """Input and target of a training batch in the units of the weights."""
        x = self.normalize(batch.x)
        return x, x if batch.y is batch.x else self.normalize_target(batch.y)

    def denormalize(self, x_norm: Float[Tensor, "batch d_in"], x: Any = None) -> Float[Tensor, "batch d_in"]:
        """Map back to raw units. Raises `ValueError` if a normalisation by token lacks the raw activations `x`."""
        raw = x_norm / self.scale + self.center
        if self.config.normalize not in TOKEN_NORMS:
            return raw
        tokens = tokens_given(self.config.normalize, x).to(raw)
        if self.whitening is not None:
            return self.whitening.restore(raw, tokens)
        return restore_tokens(self.config.normalize, raw, tokens)

    def token_sizes(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch 1"]:
        """Size in raw units, at each token, of 1 in the decoder's units over its scale: 1 unless tokens are normalised."""
        return token_sizes(self.config.normalize, x) if self.whitening is None else self.whitening.sizes(x)

    def encode(self, x: Any) -> SparseActs:
        """Feature activations of raw activations `x (batch, d_in)`, a tensor or NumPy array of floats; float32 if the weights are
        in half precision. Raises `ValueError` for rows with NaN or infinite values."""
        return self.encode_normalized(self.checked(self.normalize(x)))

    def checked(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """Return `x`, or raise if it is not finite: no threshold keeps NaN, so the token would seem to have no features."""
        check_finite(x, self.provenance.origin.get("hook_name"))
        return x

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        """Feature activations of inputs that `normalize` has mapped."""
        raise NotImplementedError

    def decode(self, feature_acts: SparseActs, x: Any = None) -> Float[Tensor, "batch d_in"]:
        """Reconstruction in raw units, `(batch, d_in)`; a normalisation by token needs the raw activations `x`."""
        return self.denormalize(decode(feature_acts, self.W_dec, self.b_dec), x)

    def forward(self, x: Any) -> SAEOutput:
        """Encode and decode: `x_hat == decode(encode(x), x)`, to which a skip transcoder adds `skip(x)`."""
        feature_acts = self.encode(x)
        return SAEOutput(self.decode(feature_acts, x), feature_acts)

    def calibrate(self, x: Float[Tensor, "n ..."]) -> bool:
        """At the end of training, adjust thresholds so that the mean L0 on held-out raw rows `x` is the configured one.

        Returns whether anything was calibrated: False if the selection is exact or the config sets no L0."""
        return False

    def sparse_target(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"]
    ) -> Float[Tensor, "batch d_out"]:
        """What the features have to reconstruct: the target minus what a variant adds in another way."""
        return target

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        """The training loss of one batch."""
        raise NotImplementedError

    @property
    def weight_decay(self) -> dict[nn.Parameter, float]:
        """AdamW weight decay of the parameters that have one."""
        return {}

    @torch.no_grad()
    def after_step(self) -> None:
        """Called after each optimiser step: rescales decoder rows to norm 1 where they are kept there."""
        if self.unit_norm:
            unit_norm_(self.W_dec)

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """Rescale decoder rows to norm 1 and move their norms into the encoder: reconstructions are unchanged, and all
        features activate in the same unit. Zero rows are unchanged; does nothing if training keeps rows at norm 1."""
        if not self.unit_norm:
            norms = self.decoder_norms
            self.fold(torch.where(norms > 0, norms, 1))

    def fold(self, norms: Float[Tensor, " d_sae"]) -> None:
        """Multiply everything that feature activations are computed from by `norms`, and divide decoder rows by them."""
        self.W_enc.mul_(norms[:, None])
        self.b_enc.mul_(norms)
        self.W_dec.div_(norms[:, None])

    def decoder(self, source: int = -1) -> tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, ""]]:
        """Decoder rows and their scale at the hook that features write to (`source` indexes a crosscoder's sources)."""
        return self.W_dec if self.whitening is None else self.whitening.raw_rows(self.W_dec), self.scale

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """The norm of each feature's decoder row."""
        return widened(self.W_dec)[0].norm(dim=1)

    def as_exported(self) -> SAE:
        """What other libraries' formats are written from: itself, or an SAE of a variant they know that computes the same."""
        return self

    @property
    def hash(self) -> str:
        """SHA-256 over names, shapes and bytes of the weights."""
        return tensors_hash(self.state_dict())
