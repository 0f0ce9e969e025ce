"""The hooks of each model family: TransformerLens hook names -> modules of the running model (`HookPlace`).

A new family is a line in `_SUBMODULES`; without one it has only the hooks of the residual stream. Two kinds of model share this
file: plain Hugging Face modules (fast, read with forward hooks) and a TransformerBridge, whose hook points are already modules.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import nn

from saelab.models.families import Decoder


class HookPlace(NamedTuple):
    """One place in a model: the input or output of a module, the stream between attention and MLP, or a hook point."""

    module: nn.Module
    kind: Literal["input", "output", "mid", "point"]
    layer: nn.Module | None = None


# model_type -> (attention, its output projection, MLP, norm in front of the MLP), as attribute names of a layer
_LLAMA_SUBMODULES = ("self_attn", "o_proj", "mlp", "post_attention_layernorm")
_SUBMODULES = {
    "llama": _LLAMA_SUBMODULES,
    "mistral": _LLAMA_SUBMODULES,
    "qwen2": _LLAMA_SUBMODULES,
    "qwen3": _LLAMA_SUBMODULES,
    "gpt2": ("attn", "c_proj", "mlp", "ln_2"),
    "gpt_neox": ("attention", "dense", "mlp", "post_attention_layernorm"),
}


def hf_hook_places(decoder: Decoder, with_submodules: bool = True) -> dict[str, HookPlace]:
    """Fast hooks of a Hugging Face decoder, in forward order; for families not in `_SUBMODULES` only the residual stream."""
    hook_places: dict[str, HookPlace] = {}
    submodules = _SUBMODULES.get(decoder.config.model_type) if with_submodules else None
    parallel = getattr(decoder.config, "use_parallel_residual", False)
    for i, layer in enumerate(decoder.layers):
        here = {"hook_resid_pre": HookPlace(layer, "input")}
        if submodules is not None:
            attention, projection, mlp, norm = submodules
            attention = getattr(layer, attention)
            here["attn.hook_z"] = HookPlace(getattr(attention, projection), "input")
            here["hook_attn_out"] = HookPlace(attention, "output")
            if not parallel:  # parallel blocks have no stream between attention and MLP
                here["hook_resid_mid"] = HookPlace(getattr(layer, norm), "mid", layer)
            here["hook_mlp_out"] = HookPlace(getattr(layer, mlp), "output")
        here["hook_resid_post"] = HookPlace(layer, "output")
        hook_places |= {f"blocks.{i}.{suffix}": place for suffix, place in here.items()}
    return hook_places


def bridge_hook_places(bridge: Any) -> dict[str, HookPlace]:
    """Every hook point of a TransformerBridge under each of its names."""
    return {name: HookPlace(point, "point") for name, point in bridge.hook_dict.items()}
