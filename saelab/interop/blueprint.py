"""`Blueprint`: an SAE as a format describes it, in saelab's orientation and with every switch that changes a number.

Each foreign format is read into a blueprint and written from one. With x_norm the input after `normalize`,

    u = W_enc (scale x_norm - b_dec [if pre_bias]) + b_enc,   x_hat = (W_dec z + b_dec) / scale_out [+ W_skip x]

and z keeps the u that `variant`, `k`, `threshold` and `options` select.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saelab.errors import SaelabError
from saelab.saes import SAE, VARIANTS
from saelab.saes.provenance import Provenance

SMALLEST_THRESHOLD = 1e-30
"""Stands for a JumpReLU threshold of 0 or less, which keeps every positive pre-activation; the logarithm of 0 is infinite."""
TRANSCODERS = ("transcoder", "skip_transcoder", "batch_topk_transcoder", "relu_transcoder", "jumprelu_transcoder")
_CENTERED = ("topk", "abs_topk", "relu", "jumprelu", "gated")
"""Variants for which `pre_bias` is a switch; the others always or never subtract b_dec."""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Weights `(d_sae, d_in)` and `(d_sae, d_out)`, biases, and the meaning of all that a format leaves implicit.

    Those of a crosscoder have an axis of sources in front, as its biases and scales have.
    """

    variant: str
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor | None = None
    b_dec: Tensor | None = None
    """None is zero."""
    W_skip: Tensor | None = None
    """`(d_out, d_in)`, of the raw input, added to the raw output."""
    threshold: Tensor | float | None = None
    """Strict: u > threshold; one number or one per feature."""
    k: int | None = None
    pre_bias: bool = False
    normalize: str = "none"
    """"layer_norm" or "constant_norm": of each token; otherwise "none"."""
    scale: float | Tensor = 1.0
    """What the input is multiplied by; a transcoder's output has its own."""
    scale_out: float | None = None
    """None is the same as `scale`."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Further state of the variant, under saelab's names (a gate's `b_mag` and `r_mag`)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the variant's config."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What the files say about model, hooks and data, under the keys of `sae.json`."""

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[-2]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[-1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[-1]


@torch.no_grad()
def build(plan: Blueprint) -> SAE:
    """The SAE. Raises `SaelabError` for tensors that do not fit together."""
    _check_shapes(plan)
    variant = VARIANTS[plan.variant]
    sizes = {"d_out": plan.d_out, "n_sources": len(plan.W_enc)}
    shape = {name: sizes[name] for name in variant.extra_dims}
    sae = variant(variant.Config(**_config(plan)), plan.d_in, **shape)
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    given = {"W_dec": plan.W_dec, "b_dec": plan.b_dec, "b_enc": plan.b_enc} | _thresholds(plan) | dict(plan.tensors)
    given |= {} if variant.tied else {"W_enc": plan.W_enc}
    scale_out = plan.scale if plan.scale_out is None else plan.scale_out
    given |= {"scale": torch.as_tensor(plan.scale), "scale_out": torch.as_tensor(scale_out)}
    if plan.W_skip is not None:  # ours reads the scaled input and is divided by scale_out
        given["W_skip"] = plan.W_skip * (scale_out / plan.scale)
    for name, tensor in given.items():
        if name in state:
            state[name] = torch.zeros_like(state[name]) if tensor is None else _fitted(name, tensor, state[name])
    sae.load_state_dict(state)
    sae.provenance = Provenance(origin=dict(plan.origin), trained={"imported": True})
    return sae.eval()


def _config(plan: Blueprint) -> dict[str, Any]:
    fields = {one.name for one in dataclasses.fields(VARIANTS[plan.variant].Config)}
    config: dict[str, Any] = {"d_sae": plan.d_sae, "normalize": plan.normalize}
    if bool((torch.as_tensor(plan.scale) != 1).any()) or plan.scale_out not in (None, 1):
        if plan.normalize != "none":
            raise SaelabError(f"A scale of {plan.scale} besides normalize={plan.normalize!r} is not supported.")
        config["normalize"] = "scale"
    if plan.k is not None and "k" in fields:
        config["k"] = plan.k
    centering = {"abs_topk": "subtract_b_dec"}.get(plan.variant, "pre_bias")
    if plan.variant in _CENTERED:
        config[centering] = plan.pre_bias
    elif plan.pre_bias and plan.variant in TRANSCODERS:
        raise SaelabError(f"pre_bias=True is not supported by {plan.variant}: its b_dec has the width of its output.")
    if plan.W_skip is not None and "skip" in fields:
        config["skip"] = True
    if plan.origin.get("hook_name_out") and "hook_name_out" in fields:
        config["hook_name_out"] = plan.origin["hook_name_out"]
    return config | dict(plan.options)


def _thresholds(plan: Blueprint) -> dict[str, Tensor]:
    """The threshold as each variant stores it."""
    if plan.threshold is None:
        return {}
    threshold = torch.as_tensor(plan.threshold, dtype=torch.float32)
    if plan.variant in ("jumprelu", "jumprelu_transcoder"):
        return {"log_threshold": threshold.expand(plan.d_sae).clamp_min(SMALLEST_THRESHOLD).log()}
    return {"threshold": threshold, "n_observed": torch.ones_like(threshold, dtype=torch.int64)}


def _fitted(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.shape != like.shape:
        raise SaelabError(
            f"{name} has shape {tuple(tensor.shape)}, but {tuple(like.shape)} was expected from the others."
        )
    return tensor.to(like.dtype)


def _check_shapes(plan: Blueprint) -> None:
    for name in ("W_enc", "W_dec"):
        if getattr(plan, name).ndim != (3 if plan.variant == "crosscoder" else 2):
            raise SaelabError(
                f"{name} has shape {tuple(getattr(plan, name).shape)}, which is none of a {plan.variant}."
            )
    if plan.W_dec.shape[-2] != plan.d_sae:
        raise SaelabError(
            f"W_enc is of {plan.d_sae} features and width {plan.d_in}, W_dec of {plan.W_dec.shape[-2]} features and width "
            f"{plan.d_out}: the tensors do not belong together, or one of them is transposed."
        )
    if plan.d_out != plan.d_in and plan.variant not in TRANSCODERS:
        raise SaelabError(f"W_enc has width {plan.d_in} and W_dec {plan.d_out}, but only a transcoder's may differ.")
    check_numbers(plan)


def check_numbers(plan: Blueprint) -> None:
    """Raise `SaelabError` for NaN, infinite weights, and thresholds and scales that are none."""
    named = {name: getattr(plan, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip")} | dict(plan.tensors)
    infinite = [name for name, tensor in named.items() if not _finite(tensor)]
    if infinite:
        raise SaelabError(f"{' and '.join(infinite)} hold NaN or infinite numbers: the file is damaged.")
    if plan.threshold is not None:  # an infinite one is that of a feature that never fires
        threshold = torch.as_tensor(plan.threshold, dtype=torch.float32)
        if threshold.ndim > 1 or (threshold.ndim == 1 and len(threshold) != plan.d_sae):
            raise SaelabError(
                f"threshold has shape {tuple(threshold.shape)}, but one number or {plan.d_sae} were expected."
            )
        if bool(threshold.isnan().any()):
            raise SaelabError("threshold holds NaN: the file is damaged.")


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(tensor.isfinite().all())
