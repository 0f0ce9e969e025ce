"""SAELens: `cfg.json` and `sae_weights.safetensors`, of version 6 and, migrated as SAELens does, of earlier versions.

`W_enc` is `(d_in, d_sae)` there. Weights are as trained only in checkpoints during training, which SAELens does not fold:
their scale or whitening stands in `activation_scaler.json` and `activation_whitening.safetensors`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import SaelabError
from saelab.files import atomic_save_safetensors, atomic_write_json
from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.describing import as_thresholds, refuse
from saelab.interop.folding import fold_decoder_norms, fold_whitening
from saelab.interop.names import model_id, module_of_hook
from saelab.interop.source import Source, check_present
from saelab.interop.values import boolean, check_sizes, check_unused, integer

NAME = "sae_lens"
WANTS = "cfg.json and sae_weights.safetensors"
FOR_VERSION = "6.54.0"
"""The version of SAELens whose config is written."""
VARIANT_OF = {
    "standard": "relu",
    "gated": "gated",
    "topk": "topk",
    "abstopk": "abs_topk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "matching_pursuit": "matching_pursuit",
    "transcoder": "relu_transcoder",
    "skip_transcoder": "relu_transcoder",
    "jumprelu_transcoder": "jumprelu_transcoder",
    "jumprelu_skip_transcoder": "jumprelu_transcoder",
}
NORMALIZE_OF = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
    "expected_average_only_in": "none",
    "covariance_whitening": "none",
}
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


def matches(source: Source) -> bool:
    return source.has("cfg.json", "sae_weights.safetensors")


def load(source: Source, answers: Answers) -> Blueprint:
    cfg = migrated(source.json("cfg.json"))
    architecture = cfg.get("architecture", "standard")
    if architecture not in VARIANT_OF:
        raise SaelabError(
            f"{source.label} has the SAELens architecture {architecture!r}; saelab reads {', '.join(VARIANT_OF)}."
        )
    if cfg.get("hook_head_index") is not None:
        raise SaelabError(f"{source.label} reads head {cfg['hook_head_index']} alone; saelab reads whole hooks.")
    stored = source.tensors("sae_weights.safetensors")
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    plan = _plan(cfg, architecture, tensors, answers, source.label)
    if cfg.get("rescale_acts_by_decoder_norm"):  # a threshold is in rescaled units already
        plan = dataclasses.replace(fold_decoder_norms(plan), threshold=plan.threshold)
    return _normalized(plan, cfg, source, answers)


def migrated(cfg: dict[str, Any]) -> dict[str, Any]:
    """A config with its metadata at the top level and, before version 6, with the names and defaults of version 6."""
    cfg = {**(cfg.get("metadata") or {}), **cfg}
    cfg = {_OLD_NAMES.get(key, key): value for key, value in cfg.items()}
    k = (cfg.get("activation_fn_kwargs") or {}).get("k")
    if cfg.get("activation_fn") == "topk" and k is not None and cfg.get("architecture", "standard") == "standard":
        cfg |= {"architecture": "topk", "k": k}
    how = cfg.get("normalize_activations")
    if how is None or isinstance(how, bool):
        cfg["normalize_activations"] = "expected_average_only_in" if how else "none"
    return cfg


def _plan(
    cfg: dict[str, Any], architecture: str, tensors: dict[str, Tensor], answers: Answers, where: str
) -> Blueprint:
    variant = VARIANT_OF[architecture]
    _check(cfg, architecture, tensors, where)
    W_dec, scaling = tensors["W_dec"], tensors.get("scaling_factor", tensors.get("finetuning_scaling_factor"))
    if scaling is not None:  # it multiplies feature activations, in the decoder alone
        W_dec = W_dec * scaling.flatten()[:, None]
    subtracts = boolean(cfg.get("apply_b_dec_to_input"), "apply_b_dec_to_input", where, default=True)
    pre_bias = subtracts and not architecture.endswith("transcoder")
    options, extra, k, threshold = {}, {}, None, None
    if variant in ("topk", "abs_topk"):
        k = integer(answers.need("k", cfg.get("k"), where), "k", where)
    elif variant == "gated":
        extra = {"b_mag": tensors["b_mag"], "r_mag": tensors["r_mag"]}
    elif variant == "matching_pursuit":
        k, options = _pursuit(cfg, W_dec.shape[1], where)
    elif variant.startswith("jumprelu"):
        threshold = _threshold(tensors, answers, where)
    b_dec = tensors["b_dec"] if variant != "matching_pursuit" or pre_bias else None
    return Blueprint(
        variant=variant,
        W_enc=(tensors["W_enc"].T if "W_enc" in tensors else W_dec).contiguous(),
        W_dec=W_dec,
        b_enc=tensors.get("b_gate", tensors.get("b_enc")),
        b_dec=b_dec,
        W_skip=tensors.get("W_skip"),
        threshold=threshold,
        k=k,
        pre_bias=pre_bias,
        tensors=extra,
        options=options,
        origin=_origin(cfg),
    )


def _pursuit(cfg: dict[str, Any], d_in: int, where: str) -> tuple[int, dict[str, Any]]:
    """Steps and options of a matching pursuit."""
    most = cfg.get("max_iterations")
    k = d_in if most is None else integer(most, "max_iterations", where)
    stops = boolean(cfg.get("stop_on_duplicate_support"), "stop_on_duplicate_support", where, default=True)
    return k, {"residual_threshold": float(cfg.get("residual_threshold", 1e-2)) / d_in**0.5, "stop_on_duplicate": stops}


def _check(cfg: dict[str, Any], architecture: str, tensors: dict[str, Tensor], where: str) -> None:
    """Raise `SaelabError` for tensors that this architecture lacks or has no use for, and for other sizes in the config."""
    name, wanted = f"{where}, a {architecture} SAE,", _wanted(architecture)
    check_present(tensors, wanted, name)
    thresholds = ["threshold", "log_threshold"] if VARIANT_OF[architecture].startswith("jumprelu") else []
    check_unused(tensors, [*wanted, *thresholds], name)
    d_sae, d_in = tensors["W_enc"].T.shape if "W_enc" in tensors else tensors["W_dec"].shape
    check_sizes(cfg, {"d_in": d_in, "d_sae": d_sae}, where)


def _wanted(architecture: str) -> list[str]:
    kind = architecture.replace("jumprelu_", "")
    if kind == "matching_pursuit":
        return ["W_dec", "b_dec"]
    wanted = ["W_enc", "W_dec", "b_dec"] + (["b_gate", "b_mag", "r_mag"] if kind == "gated" else ["b_enc"])
    return wanted + (["W_skip"] if kind == "skip_transcoder" else [])


def _threshold(tensors: dict[str, Tensor], answers: Answers, where: str) -> Any:
    """Per feature; one number for all in training checkpoints of BatchTopK and Matryoshka SAEs."""
    found = next((tensors[name] for name in ("threshold", "topk_threshold") if name in tensors), None)
    if found is None and "log_threshold" in tensors:
        found = tensors["log_threshold"].exp()
    return answers.need("threshold", found, where)


def _normalized(plan: Blueprint, cfg: dict[str, Any], source: Source, answers: Answers) -> Blueprint:
    """The blueprint with the normalisation of its inputs."""
    how = cfg["normalize_activations"]
    if how not in NORMALIZE_OF:
        raise SaelabError(f"{source.label} has normalize_activations={how!r}; saelab reads {', '.join(NORMALIZE_OF)}.")
    if how == "covariance_whitening":
        if not source.has("activation_whitening.safetensors"):
            raise SaelabError(
                f"{source.label} was trained on whitened activations and is not folded: its activation_whitening.safetensors is "
                "missing. Take the whole checkpoint folder, or the SAE saved at the end of training."
            )
        return fold_whitening(plan, source.tensors("activation_whitening.safetensors"))
    if how == "expected_average_only_in":
        scaler = source.json("activation_scaler.json") if source.has("activation_scaler.json") else {}
        where = f"{source.label} (normalize_activations={how!r}, scale = sqrt(d_in) / mean norm of the activations)"
        return dataclasses.replace(plan, scale=float(answers.need("scale", scaler.get("scaling_factor"), where)))
    if NORMALIZE_OF[how] != "none" and plan.W_skip is not None:
        raise SaelabError(
            f"{source.label} has normalize_activations={how!r} beside a skip, which saelab cannot express."
        )
    return dataclasses.replace(plan, normalize=NORMALIZE_OF[how])


def _origin(cfg: dict[str, Any]) -> dict[str, Any]:
    origin: dict[str, Any] = {"hook_name": gemma_mlp_in(cfg.get("hook_name"), cfg.get("hf_hook_name"))}
    if cfg.get("hook_name_out"):
        origin["hook_name_out"] = cfg["hook_name_out"]
    if name := model_id(cfg.get("model_name")):
        origin["model"] = {"name": name}
    if cfg.get("prepend_bos") is not None:
        origin["prepend_bos"] = bool(cfg["prepend_bos"])
    if cfg.get("context_size"):
        origin["ctx_len"] = int(cfg["context_size"])
    if cfg.get("l0"):
        origin["claims"] = {"l0": float(cfg["l0"])}
    return {key: value for key, value in origin.items() if value is not None}


def gemma_mlp_in(hook_name: str | None, hf_hook_name: str | None) -> str | None:
    """The hook that a transcoder reads: SAELens writes `hook_mlp_in` for Gemma, where it is the output of the norm in front of
    the MLP; in TransformerLens that name is the stream before this norm."""
    if hook_name and hf_hook_name and hf_hook_name.endswith("pre_feedforward_layernorm.output"):
        return hook_name.replace(".hook_mlp_in", ".mlp.hook_in")
    return hook_name


def claimed_l0(source: Source) -> float | None:
    """Sum of the firing probabilities in `sparsity.safetensors` (log10), if it is there."""
    if not source.has("sparsity.safetensors"):
        return None
    sparsity = source.tensors("sparsity.safetensors").get("sparsity")
    return None if sparsity is None else float(torch.pow(10.0, sparsity.double()).sum())


def _module(hook_name: str | None, model: str | None) -> str | None:
    """Hugging Face's path of the hook for the models that SAELens reads so; other families name their modules otherwise."""
    return module_of_hook(hook_name, model) if "gemma" in (model or "") else None


def save(plan: Blueprint, folder: Path) -> None:
    """Write version 6, folded. Raises `SaelabError` for what it cannot hold."""
    if plan.options.get("select", "topk") != "topk":
        raise refuse(NAME, "a selection by groups (groupmax)")
    if plan.options.get("score", "value") != "value":
        raise refuse(NAME, "pre-activations compared after multiplication by decoder norms, with activations before it")
    if plan.variant in ("transcoder", "skip_transcoder"):
        raise refuse(NAME, "a TopK transcoder")
    if plan.options.get("signed"):
        raise refuse(NAME, "a matching pursuit with negative activations")
    plan = plan if plan.variant in ("relu", "relu_transcoder") else as_thresholds(plan)
    architecture = {"relu": "standard", "abs_topk": "abstopk", "relu_transcoder": "transcoder"}.get(
        plan.variant, plan.variant
    )
    if plan.W_skip is not None:
        architecture = architecture.replace("transcoder", "skip_transcoder")
    norm = next(name for name, kind in NORMALIZE_OF.items() if kind == plan.normalize)
    if norm != "none" and architecture.endswith("transcoder"):
        raise refuse(NAME, f"a transcoder with normalize={plan.normalize!r}")
    cfg: dict[str, Any] = {"architecture": architecture, "d_in": plan.d_in, "d_sae": plan.d_sae, "dtype": "float32"}
    cfg |= {"device": "cpu", "apply_b_dec_to_input": plan.pre_bias, "normalize_activations": norm}
    hook = str(plan.origin.get("hook_name") or "")
    cfg |= {"reshape_activations": "hook_z" if hook.endswith("hook_z") else "none"}
    if plan.variant in ("topk", "abs_topk"):
        cfg |= {"k": plan.k, "rescale_acts_by_decoder_norm": False}
    if plan.variant == "matching_pursuit":
        cfg |= {"max_iterations": plan.k, "residual_threshold": plan.options["residual_threshold"] * plan.d_in**0.5}
        cfg |= {"stop_on_duplicate_support": plan.options.get("stop_on_duplicate", False)}
    if architecture.endswith("transcoder"):
        cfg |= {"d_out": plan.d_out, "apply_b_dec_to_input": False}
    atomic_save_safetensors(folder / "sae_weights.safetensors", _tensors(plan))
    atomic_write_json(folder / "cfg.json", cfg | {"metadata": _metadata(plan)})


def _tensors(plan: Blueprint) -> dict[str, Tensor]:
    tensors = {"W_dec": plan.W_dec, "b_dec": torch.zeros(plan.d_out) if plan.b_dec is None else plan.b_dec}
    b_enc = torch.zeros(plan.d_sae) if plan.b_enc is None else plan.b_enc
    if plan.variant != "matching_pursuit":
        tensors |= {"W_enc": plan.W_enc.T, "b_gate" if plan.variant == "gated" else "b_enc": b_enc}
    if plan.threshold is not None:
        tensors["threshold"] = torch.as_tensor(plan.threshold, dtype=torch.float32).expand(plan.d_sae)
    if plan.W_skip is not None:
        tensors["W_skip"] = plan.W_skip
    return {name: tensor.float().contiguous() for name, tensor in (tensors | dict(plan.tensors)).items()}


def _metadata(plan: Blueprint) -> dict[str, Any]:
    """Model, hooks and how texts are read, in SAELens' words."""
    origin = plan.origin
    hook_name = origin.get("hook_name")
    model, bos = origin.get("model") or {}, origin.get("prepend_bos")
    found = {"sae_lens_version": FOR_VERSION, "sae_lens_training_version": None, "model_name": model.get("name")}
    found |= {
        "hook_name": hook_name,
        "hook_name_out": origin.get("hook_name_out"),
        "context_size": origin.get("ctx_len"),
    }
    found |= {"prepend_bos": None if bos is None else bool(bos), "hf_hook_name": _module(hook_name, model.get("name"))}
    return {key: value for key, value in found.items() if value is not None} | {"sae_lens_training_version": None}
