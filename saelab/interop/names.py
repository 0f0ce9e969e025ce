"""Names that other libraries give to models and hooks, as saelab's (those of Hugging Face and of TransformerLens)."""

from __future__ import annotations

import re

_MODELS = {
    "gpt2-small": "gpt2",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
}
_OWNERS = (
    (r"gemma-|recurrentgemma-", "google"),
    (r"pythia-|gpt-neo-|gpt-j-", "EleutherAI"),
    (r"(?:meta-)?llama-", "meta-llama"),
    (r"qwen", "Qwen"),
    (r"mistral-|mixtral-", "mistralai"),
    (r"phi-", "microsoft"),
    (r"smollm", "HuggingFaceTB"),
    (r"opt-", "facebook"),
)

# Hugging Face's module paths, from a layer on, to TransformerLens' names; `.output` and `.input` as Gemma Scope 2 writes them.
_IN_LAYER = (
    (r"output", "hook_resid_post"),
    (r"input", "hook_resid_pre"),
    (r"(?:self_attn\.o_proj|attn\.c_proj|attention\.dense)\.input", "attn.hook_z"),
    (r"post_feedforward_layernorm\.output", "hook_mlp_out"),
    (r"pre_feedforward_layernorm\.output", "mlp.hook_in"),
    (r"mlp\.output", "hook_mlp_out"),
    (r"mlp\.input", "mlp.hook_in"),
    (r"(?:self_attn|attn|attention)\.output", "hook_attn_out"),
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.(.*))?$")


def model_id(name: str | None) -> str | None:
    """The Hugging Face id of a model that may be named as TransformerLens does, without its owner."""
    if not name or "/" in name or name == "smollm2":  # saelab's own name of its embedded model
        return name or None
    if name.lower() in _MODELS:
        return _MODELS[name.lower()]
    for pattern, owner in _OWNERS:
        if re.match(pattern, name.lower()):
            return f"{owner}/{name}"
    return name


def layer_of(text: str, pattern: str = r"layer_?(\d+)") -> int | None:
    """The last layer number in a path."""
    found = re.findall(pattern, text)
    return int(found[-1]) if found else None


def hook_of_module(path: str, side: str = "output") -> str | None:
    """TransformerLens' name of a module's output or input ("model.layers.9.mlp", "layers.9", "h.3"); None if it has none here.

    A path may end in ".output" or ".input", which then says the side.
    """
    found = _LAYER.search(path)
    if path.endswith("embed_tokens") or path == "wte":
        return "hook_embed"
    if not found:
        return None
    layer, rest = found.groups()
    rest = rest or ""
    if not rest.endswith(("output", "input")):
        rest = f"{rest}.{side}" if rest else side
    for pattern, hook in _IN_LAYER:
        if re.fullmatch(pattern, rest):
            return f"blocks.{layer}.{hook}"
    return None


def module_of_hook(hook_name: str | None, model: str | None) -> str | None:
    """Hugging Face's path of a hook, as Gemma Scope 2 writes it: the inverse of `hook_of_module`."""
    has_norms = re.search(r"gemma-?v?[23]", model or "") is not None
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name or "")
    inside = {
        "hook_resid_post": "output",
        "hook_resid_pre": "input",
        "attn.hook_z": "self_attn.o_proj.input",
        "hook_mlp_out": "post_feedforward_layernorm.output" if has_norms else "mlp.output",
        "mlp.hook_in": "pre_feedforward_layernorm.output" if has_norms else "mlp.input",
    }
    if not found or found.group(2) not in inside:
        return None
    return f"model.layers.{found.group(1)}.{inside[found.group(2)]}"
