"""`blueprint_of`: an SAE of saelab as a blueprint of raw activations, which every export starts from. Exact, up to rounding."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from saelab.errors import SaelabError
from saelab.interop.blueprint import TRANSCODERS, Blueprint
from saelab.saes import SAE
from saelab.saes.gated import GatedSAE
from saelab.saes.jumprelu import JumpReLUSAE
from saelab.saes.matching_pursuit import MatchingPursuitSAE
from saelab.saes.threshold import ThresholdSAE
from saelab.saes.token_norm import TOKEN_NORMS
from saelab.saes.transcoding import Transcoding

_OPTIONS = ("select", "score", "stop_on_duplicate", "residual_threshold", "signed", "group_fractions")


@torch.no_grad()
def blueprint_of(sae: SAE) -> Blueprint:
    """The SAE with its centre and scale folded into the weights, so that it reads and writes raw activations.

    Raises `SaelabError` for variants that are more than one encoder and one decoder, and where folding would change feature
    activations.
    """
    _refuse_other_units(sae)
    scale, center = sae.scale.double(), sae.center.double()
    out = (sae.scale_out.double(), sae.center_out.double()) if isinstance(sae, Transcoding) else (scale, center)
    W_enc = sae.W_enc.double() * (1.0 if isinstance(sae, MatchingPursuitSAE) else scale)
    b_enc, tensors = (sae.b_enc.double() if hasattr(sae, "b_enc") else None), _gate(sae)
    if sae.pre_bias is None and bool(center.any()):  # otherwise b_dec below subtracts it
        b_enc = (W_enc.new_zeros(sae.d_sae) if b_enc is None else b_enc) - W_enc @ center
        if tensors:
            tensors["b_mag"] = tensors["b_mag"] - tensors["r_mag"].exp() * (W_enc @ center)
    b_dec, W_skip = sae.b_dec.double() / out[0] + out[1], None
    if isinstance(sae, Transcoding) and sae.has_skip:
        W_skip = sae.W_skip.double() * scale / out[0]
        b_dec = b_dec - W_skip @ center
    return Blueprint(
        variant=sae.exported_as or sae.variant,
        W_enc=W_enc.float(),
        W_dec=(sae.W_dec.double() / out[0]).float(),
        b_enc=None if b_enc is None else b_enc.float(),
        b_dec=b_dec.float(),
        W_skip=None if W_skip is None else W_skip.float(),
        threshold=_threshold(sae),
        k=getattr(sae.config, "k", None),
        pre_bias=sae.pre_bias is not None,
        normalize=sae.config.normalize if sae.config.normalize in TOKEN_NORMS else "none",
        tensors={name: tensor.float() for name, tensor in tensors.items()},
        options={name: getattr(sae.config, name) for name in _OPTIONS if hasattr(sae.config, name)},
        origin=dict(sae.provenance.origin),
    )


def _refuse_other_units(sae: SAE) -> None:
    """Raise `SaelabError` for what is no encoder and decoder of raw activations."""
    if sae.variant in ("crosscoder", "codebook", "top_afa", "icfl"):
        raise SaelabError(
            f"A {sae.variant} is in no other library's format; save it in saelab's own (format='saelab')."
        )
    if sae.whitening is not None:
        raise SaelabError(
            f"This {sae.variant} whitens its input by control data, which no other library's format can hold; save it in "
            "saelab's own (format='saelab')."
        )
    if getattr(sae, "folded", None) is not None:
        raise SaelabError(
            "This transcoder compares its features in the units before its decoder norms were folded, which no other format "
            "can hold; save it in saelab's own (format='saelab')."
        )
    if isinstance(sae, MatchingPursuitSAE) and float(sae.scale) != 1:
        raise SaelabError(
            f"This matching pursuit SAE scales its input by {float(sae.scale):.4g}, and its encoder is its decoder: no other "
            "format can hold the scale; train one with normalize='none' to export it."
        )


def _gate(sae: SAE) -> dict[str, torch.Tensor]:
    return {"b_mag": sae.b_mag.double(), "r_mag": sae.r_mag.double()} if isinstance(sae, GatedSAE) else {}


def _threshold(sae: SAE) -> Any:
    if isinstance(sae, JumpReLUSAE):
        return sae.threshold.float()
    if not isinstance(sae, ThresholdSAE):
        return None
    threshold = sae.known_threshold().float()
    if bool((threshold < 0).any()):
        raise SaelabError(
            f"This {sae.variant} SAE has a threshold below 0, so it keeps negative pre-activations, which no other library's "
            "format can hold; save it in saelab's own (format='saelab')."
        )
    return threshold


def with_pre_bias(plan: Blueprint, pre_bias: bool) -> Blueprint:
    """The same function with b_dec subtracted from the input or not: the difference goes into the encoder's bias."""
    if plan.pre_bias == pre_bias:
        return plan
    if plan.variant in TRANSCODERS or plan.variant == "matching_pursuit":
        raise SaelabError(f"A {plan.variant} cannot be written as an SAE that subtracts b_dec.")
    b_dec = torch.zeros(plan.d_out) if plan.b_dec is None else plan.b_dec
    shift = (plan.W_enc.double() @ b_dec.double()) * (1 if pre_bias else -1)
    b_enc = torch.zeros(plan.d_sae) if plan.b_enc is None else plan.b_enc
    tensors = dict(plan.tensors)
    if "b_mag" in tensors:
        tensors["b_mag"] = (tensors["b_mag"].double() + tensors["r_mag"].double().exp() * shift).float()
    return dataclasses.replace(plan, b_enc=(b_enc.double() + shift).float(), pre_bias=pre_bias, tensors=tensors)


def as_thresholds(plan: Blueprint) -> Blueprint:
    """ReLU and all selections by a threshold as JumpReLU, which is the same at inference."""
    if plan.variant in ("relu", "relu_transcoder"):
        kind = plan.variant.replace("relu", "jumprelu")
        return dataclasses.replace(plan, variant=kind, threshold=torch.zeros(plan.d_sae))
    if plan.variant in ("batch_topk", "matryoshka", "mutual_choice", "feature_choice", "batch_topk_transcoder"):
        kind = "jumprelu_transcoder" if plan.variant in TRANSCODERS else "jumprelu"
        threshold = torch.as_tensor(plan.threshold, dtype=torch.float32).expand(plan.d_sae).clone()
        return dataclasses.replace(plan, variant=kind, threshold=threshold)
    return plan


def refuse(format: str, what: str) -> SaelabError:
    """The error for what a format cannot hold."""
    return SaelabError(f"The format {format} cannot hold {what}; save it in saelab's own (format='saelab').")
