"""sparsify (EleutherAI): `cfg.json` and `sae.safetensors` in a folder named after the hook point; `config.json` of the whole run
above it. `W_dec` is `(d_sae, d_in)`; `b_dec` is subtracted from the input unless it is a transcoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from saelab.errors import SaelabError
from saelab.files import atomic_save_safetensors, atomic_write_json
from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.describing import refuse, with_pre_bias
from saelab.interop.names import hook_of_module
from saelab.interop.source import Source, check_present, read_object
from saelab.interop.values import boolean, check_sizes, check_unused, integer

NAME = "sparsify"
WANTS = "cfg.json and sae.safetensors"
_SELECT = {"topk": "topk", "groupmax": "groupmax"}


def matches(source: Source) -> bool:
    return source.has("cfg.json", "sae.safetensors")


def load(source: Source, answers: Answers) -> Blueprint:
    cfg, tensors = source.json("cfg.json"), source.tensors("sae.safetensors")
    check_present(tensors, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), f"{source.label}: sae.safetensors")
    if cfg.get("signed"):
        raise SaelabError(f"{source.label} is a signed TopK SAE of an early sparsify, which saelab does not read.")
    activation = cfg.get("activation", "topk")
    if activation not in _SELECT:
        raise SaelabError(f"{source.label} has activation={activation!r}; saelab reads {', '.join(_SELECT)}.")
    latents, width = tensors["encoder.weight"].shape
    check_sizes(cfg, {"d_in": width}, source.label)
    named = cfg.get("num_latents") or (width * cfg["expansion_factor"] if cfg.get("expansion_factor") else None)
    if named and named != latents:
        raise SaelabError(f"{source.label}: cfg.json says {named} latents, sae.safetensors holds {latents}.")
    transcode = boolean(cfg.get("transcode"), "transcode", source.label)
    skips = boolean(cfg.get("skip_connection"), "skip_connection", source.label)
    check_unused(tensors, ["W_skip"] if skips else [], f"{source.label}, of which cfg.json says no skip_connection,")
    skip = tensors.get("W_skip") if skips else None
    if skips and skip is None:
        raise SaelabError(f"{source.label}: cfg.json says skip_connection, but sae.safetensors has no W_skip.")
    if skip is not None and not transcode:
        raise SaelabError(
            f"{source.label} has a skip but is no transcoder (transcode false), which saelab does not read."
        )
    variant = "topk" if not transcode else "transcoder" if skip is None else "skip_transcoder"
    return Blueprint(
        variant=variant,
        W_enc=tensors["encoder.weight"].float(),
        W_dec=tensors["W_dec"].float(),
        b_enc=tensors["encoder.bias"],
        b_dec=tensors["b_dec"],
        W_skip=skip,
        k=integer(answers.need("k", cfg.get("k"), source.label), "k", source.label),
        pre_bias=not transcode,
        options={"select": _SELECT[activation]},
        origin=_origin(source, answers, transcode),
    )


def _origin(source: Source, answers: Answers, transcode: bool) -> dict[str, Any]:
    """From the folder's name and the run's config."""
    point = source.label.rstrip("/").rpartition("/")[2]
    origin: dict[str, Any] = {"hook_name": hook_of_module(point, "input" if transcode else "output")}
    if transcode:
        origin["hook_name_out"] = hook_of_module(point)
    path = source.above("config.json")
    config = read_object(path) if path else {}
    if config.get("model"):
        origin["model"] = {"name": str(config["model"])}
    if config.get("ctx_len"):
        origin["ctx_len"] = int(config["ctx_len"])
    origin["prepend_bos"] = answers.assume("prepend_bos", False)  # sparsify tokenises documents without it
    return {key: value for key, value in origin.items() if value is not None}


def save(plan: Blueprint, folder: Path) -> None:
    """Write a TopK SAE or transcoder. Raises `SaelabError` for what it cannot hold."""
    if plan.variant not in ("topk", "transcoder", "skip_transcoder"):
        raise refuse(NAME, f"a {plan.variant} (only a k per token)")
    if plan.normalize != "none":
        raise refuse(NAME, f"normalize={plan.normalize!r}")
    if plan.options.get("score", "value") != "value":
        raise refuse(NAME, "pre-activations compared after multiplication by decoder norms")
    if plan.d_in != plan.d_out:
        raise refuse(NAME, f"a transcoder from width {plan.d_in} to {plan.d_out}")
    transcode = plan.variant != "topk"
    plan = plan if transcode else with_pre_bias(plan, True)
    zeros = torch.zeros
    tensors = {
        "encoder.weight": plan.W_enc,
        "encoder.bias": zeros(plan.d_sae) if plan.b_enc is None else plan.b_enc,
        "W_dec": plan.W_dec,
        "b_dec": zeros(plan.d_out) if plan.b_dec is None else plan.b_dec,
    }
    tensors |= {} if plan.W_skip is None else {"W_skip": plan.W_skip}
    cfg = {"activation": plan.options.get("select", "topk"), "num_latents": plan.d_sae, "k": plan.k, "d_in": plan.d_in}
    cfg |= {"expansion_factor": max(plan.d_sae // plan.d_in, 1), "normalize_decoder": False, "multi_topk": False}
    cfg |= {"skip_connection": plan.W_skip is not None, "transcode": transcode}
    atomic_save_safetensors(
        folder / "sae.safetensors", {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    )
    atomic_write_json(folder / "cfg.json", cfg)
